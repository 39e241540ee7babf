"""What --for chooses, keeps and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.cli import EXIT_USAGE
from harness.errors import UserError
from harness.export.__main__ import main as export_main
from harness.quantize.__main__ import main as quantize_main
from harness.quantize.__main__ import parser
from harness.quantize.options import Options, from_arguments
from harness.quantize.target import choose, require_foldable
from harness.ternary.linear import TernaryLinear
from tests.harness import tiny
from tests.harness.conftest import SMALL


def options(*arguments: str) -> Options:
    return from_arguments(parser().parse_args([*arguments, "--out", "x"]))


@pytest.mark.parametrize(
    ("arguments", "columns", "settings", "said"),
    [
        # 256 columns share a grid in Q2_K, 32 in Q4_1.
        (("--for", "gguf"), {2048, 5632}, {"block_size": 256}, "Q2_K holds them in 2.625 bits"),
        (("--for", "gguf"), {576, 1536}, {"block_size": 64}, "Q4_1 holds them in 5 bits"),
        (("--for", "gguf", "--block-size", "128"), {2048}, {"block_size": 128}, "blocks of 128"),
        (("--for", "gguf", "--block-size", "512"), {2048}, {"block_size": 512}, "Q2_K"),
        (("--for", "gguf", "--recipe", "paper"), {2048}, {"block_size": 256, "reorder": "none"}, "Q2_K"),
        (("--for", "gguf", "--shift", "none"), {2048}, {"block_size": 256}, "TQ1_0 holds"),
        (
            ("--for", "gguf", "--shift", "none"),
            {576, 1536},
            {"block_size": 64},
            "Q2_0 holds them in 2.25 bits",
        ),
        (("--for", "mlx"), {576, 1536}, {"block_size": 64}, "groups of 64"),
        (("--for", "mlx"), {160}, {"block_size": 64}, "groups of 32"),
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
        (("--for", "mlx"), {100, 256}, "cannot hold rows of 100 and 256 columns: it needs a multiple of 32"),
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
