"""What --for chooses, keeps and refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import harness
from harness.cli import EXIT_USAGE
from harness.errors import UserError
from harness.export.__main__ import main as export_main
from harness.models.decoder import locate_layers
from harness.models.original import Original
from harness.quantize.__main__ import main as quantize_main
from harness.quantize.__main__ import parser
from harness.quantize.options import Options, from_arguments
from harness.quantize.target import PERPLEXITY, choose, require_foldable, require_supported
from harness.ternary.linear import TernaryLinear
from tests.harness import tiny
from tests.harness.conftest import SMALL
from tests.harness.export.checkpoints import WIDE, byte_level, write

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def options(*arguments: str) -> Options:
    return from_arguments(parser().parse_args([*arguments, "--out", "x"]))


@pytest.mark.parametrize(
    ("arguments", "columns", "settings", "said"),
    [
        # 256 columns share a grid in Q2_K, 32 in Q4_1.
        (("--for", "gguf"), {2048, 5632}, {"block_size": 256}, "stored in Q2_K (2.625 bits per weight)"),
        (("--for", "gguf"), {576, 1536}, {"block_size": 64}, "stored in Q4_1 (5 bits per weight)"),
        (("--for", "gguf", "--block-size", "128"), {2048}, {"block_size": 128}, "blocks of 128"),
        (("--for", "gguf", "--block-size", "512"), {2048}, {"block_size": 512}, "Q2_K"),
        (("--for", "gguf", "--recipe", "paper"), {2048}, {"block_size": 256, "reorder": "none"}, "Q2_K"),
        (("--for", "gguf", "--shift", "none"), {2048}, {"block_size": 256}, "stored in TQ1_0"),
        (
            ("--for", "gguf", "--shift", "none"),
            {576, 1536},
            {"block_size": 64},
            "stored in Q2_0 (2.25 bits per weight)",
        ),
        (("--for", "mlx"), {576, 1536}, {"block_size": 64}, "groups of 64"),
        (("--for", "mlx"), {160}, {"block_size": 64}, "groups of 32"),
        # Groups of 64 take a quarter of a bit more than groups of 128, and hold the recipe's blocks.
        (("--for", "mlx"), {2048, 5632}, {"block_size": 64}, "stored in groups of 64 (2.5 bits per weight)"),
        (
            ("--for", "gguf", "--block-size", "512"),
            {1536, 576},
            {"block_size": 512},
            "rows of 576 columns stored in Q4_1 (5 bits per weight), rows of 1536 columns stored in Q2_K",
        ),
        (("--for", "mlx", "--recipe", "paper"), {576}, {"block_size": 128}, "groups of 64"),
    ],
)
def test_settings_are_what_the_format_holds(
    arguments: tuple[str, ...], columns: set[int], settings: dict[str, Any], said: str
) -> None:
    chosen, lines = choose(options(*arguments), columns)
    assert (chosen.config.grid, chosen.config.reorder) == ("float16", "none")
    assert {name: getattr(chosen.config, name) for name in settings} == settings
    assert said in lines[0]


@pytest.mark.parametrize(
    ("arguments", "larger", "own", "size", "kind"),
    [
        ((), "118", "87.2", 64, "Q4_1 (5 bits"),
        (("--recipe", "paper"), "118", "99.2", 128, "Q4_1 (5 bits"),
        (("--shift", "none"), "116", "93.6", 64, "Q2_0 (2.25 bits"),
        (("--shift", "none", "--recipe", "paper"), "116", "121", 128, "Q2_0 (2.25 bits"),
    ],
)
def test_what_larger_blocks_cost_is_said(
    arguments: tuple[str, ...], larger: str, own: str, size: int, kind: str
) -> None:
    _, (_, line) = choose(options("--for", "gguf", *arguments), {2048, 5632})
    assert f"blocks of 256 gave SmolLM2-135M a perplexity of {larger} on WikiText-2, blocks of {size}" in line
    assert f"one of {own}; --block-size {size} keeps these, in {kind}" in line


@pytest.mark.parametrize(
    ("file", "shift", "size", "name"),
    [
        ("recipe", "free", 64, "+ blocks of 64, alpha and mu in 8 bits (best)"),
        *(("ladder", "free", size, f"best, blocks of {size}") for size in (128, 256)),
        *(("symmetric", "none", size, f"best, mu = 0, blocks of {size}") for size in (64, 128, 256)),
    ],
)
def test_what_larger_blocks_cost_was_measured(file: str, shift: str, size: int, name: str) -> None:
    result = json.loads((BENCHMARKS / f"{file}.json").read_text())["results"][name]
    assert f"{PERPLEXITY[shift][size]:.3g}" == f"{result['perplexity']:.3g}"


def test_vllm_takes_any_grid() -> None:
    chosen, _ = choose(options("--for", "vllm", "--recipe", "paper"), {100})
    assert chosen.config == options("--recipe", "paper", "--reorder", "none").config


def test_without_a_target_nothing_changes() -> None:
    assert choose(options("--recipe", "paper"), {100}) == (options("--recipe", "paper"), [])


@pytest.mark.parametrize(
    ("arguments", "columns", "message"),
    [
        (("--for", "gguf", "--reorder", "ssr"), {256}, "needs --reorder none; drop --reorder ssr"),
        (("--for", "mlx", "--grid", "int8"), {256}, "needs --grid float16; drop --grid int8"),
        (("--for", "gguf", "--embedding", "int8"), {256}, "drop --embedding int8"),
        (
            ("--for", "gguf", "--block-size", "48"),
            {256},
            "blocks of 48 in rows of 256 columns; pass a --bl",
        ),
        (("--for", "mlx"), {100, 256}, "cannot hold rows of 100 columns: it needs a multiple of 32"),
    ],
)
def test_what_no_type_holds_is_refused(arguments: tuple[str, ...], columns: set[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(options(*arguments), columns)


def test_a_baseline_is_for_no_program(run_main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(quantize_main, "--method", "rtn-2bit", "--for", "gguf") == EXIT_USAGE
    assert "writes no checkpoint; drop --for gguf" in capsys.readouterr().err


def test_only_what_folds_away_is_reordered(
    llama: Path, words_file: Path, run_main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And an export takes it."""
    folder, out = tmp_path / "checkpoint", tmp_path / "out"
    arguments = ("--calibration", words_file, "--eval", "none", "--block-size", 16, "--reorder", "ssr")
    assert run_main(quantize_main, llama, "--out", folder, *arguments, "--foldable", *SMALL) == 0
    layers = {name: m for name, m in harness.load(folder).named_modules() if isinstance(m, TernaryLinear)}
    assert {name for name, layer in layers.items() if "permutation" in layer.stored()} == {
        name for name in layers if name.endswith("down_proj")
    }
    bits = json.loads((folder / "report.json").read_text())["bits_per_weight"]
    size = sum(tensor.nbytes for layer in layers.values() for tensor in layer.stored().values())
    assert bits == 8 * size / sum(layer.in_features * layer.out_features for layer in layers.values())
    assert run_main(export_main, folder, "--format", "hqq", "--out", out) == 0


def test_foldable_needs_an_order_and_a_known_model() -> None:
    config = tiny.CONFIGS["llama"]()
    with pytest.raises(UserError, match="pass --reorder ssr as well"):
        require_foldable(options("--foldable"), config)
    with pytest.raises(UserError, match="not opt; drop it"):
        require_foldable(options("--foldable", "--reorder", "ssr"), tiny.CONFIGS["opt"]())
    chosen, lines = choose(options("--foldable", "--reorder", "ssr", "--for", "mlx"), {64})
    assert chosen.config.reorder == "ssr"
    assert "all columns but down_proj's in their order" in lines[0]


def written(config: Any, folder: Path, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SHARED = {**WIDE, "num_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("target", "config", "tokenizer"),
    [
        ("gguf", lambda: transformers.OlmoConfig(**WIDE), byte_level),
        ("gguf", lambda: transformers.LlamaConfig(**{**WIDE, "rope_parameters": DYNAMIC}), byte_level),
        ("gguf", lambda: transformers.LlamaConfig(**WIDE), tiny.make_tokenizer),
        ("gguf", lambda: transformers.Qwen3Config(**WIDE, attention_bias=True), byte_level),
        ("gguf", lambda: transformers.Qwen3MoeConfig(**SHARED, norm_topk_prob=False), byte_level),
        ("gguf", lambda: transformers.Qwen3MoeConfig(**SHARED, moe_intermediate_size=16), byte_level),
        ("mlx", lambda: transformers.OlmoConfig(**WIDE), byte_level),
        ("mlx", lambda: transformers.MistralConfig(**WIDE, sliding_window=8), byte_level),
    ],
)
def test_what_the_export_would_refuse_is_refused_before_the_run_in_the_same_words(
    target: str,
    config: Callable[[], Any],
    tokenizer: Callable[[], Any],
    run_main: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("They're here in 1984. " * 50)
    source = written(config(), tmp_path / "original", tokenizer())
    arguments = (source, "--calibration", text, "--for", target, "--out", out)
    assert run_main(quantize_main, *arguments) == EXIT_USAGE
    early = capsys.readouterr().err
    assert not out.exists()
    checkpoint = write(tmp_path / "checkpoint", config(), tokenizer())
    assert run_main(export_main, checkpoint, "--format", target, "--out", out) == EXIT_USAGE
    late = capsys.readouterr().err
    assert early == f"error: --for {target}: {source} cannot be exported: {late.split(': ', 2)[2]}"


@pytest.mark.parametrize(("target", "block_size"), [("gguf", 256), ("mlx", 128)])
def test_the_types_that_are_announced_are_those_of_the_export(
    target: str, block_size: int, run_main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of 256 columns and of 576."""
    config = transformers.LlamaConfig(**{**WIDE, "intermediate_size": 576})
    _, (line,) = choose(options("--for", target, "--block-size", str(block_size)), {256, 576})
    folder = write(tmp_path / "checkpoint", config, block_size=block_size)
    assert run_main(export_main, folder, "--format", target, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    wide, narrow = ("Q4_1", "Q2_K") if target == "gguf" else ("groups of 64", "groups of 128")
    for name, columns, count in ((narrow, 256, 12), (wide, 576, 2)):
        assert f"rows of {columns} columns stored in {name}" in line
        assert re.search(rf"{name}[^;]* holds? {count} matrices", printed)


def test_a_mixture_goes_from_the_run_into_a_file(
    run_main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.MixtralConfig(**{**SHARED, "hidden_size": 128, "intermediate_size": 96})
    text, folder, file = tmp_path / "text.txt", tmp_path / "out", tmp_path / "model.gguf"
    text.write_text("They're here in 1984, foxes jump: it's 3.14. " * 50)
    source = written(config, tmp_path / "original", byte_level())
    arguments = ("--calibration", text, "--eval", "none", "--for", "gguf", *SMALL)
    assert run_main(quantize_main, source, "--out", folder, *arguments) == 0
    assert "stored in Q4_1 (5 bits per weight)" in capsys.readouterr().out
    assert run_main(export_main, folder, "--format", "gguf", "--out", file) == 0
    assert "Q4_1, 5 bits per weight, holds 32 matrices" in capsys.readouterr().out


def test_a_shorter_context_is_announced(tmp_path: Path) -> None:
    config = transformers.MistralConfig(**WIDE, sliding_window=16)
    model = transformers.AutoModelForCausalLM.from_config(config)
    notes = require_supported("gguf", Original(model, byte_level(), "m"), locate_layers(model))
    assert "the file states a context of 16 tokens" in notes[0]
