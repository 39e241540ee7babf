"""python -m harness.quantize from end to end on small models."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import harness
from harness.calibration.methods import BASELINES
from harness.cli import EXIT_USAGE
from harness.errors import UserError
from harness.models.folder import PAGE, REPORT
from harness.models.original import Original
from harness.quantize.__main__ import main as quantize_main
from harness.quantize.options import RECIPES, Options
from harness.quantize.run import quantize
from reference.types import TernaryConfig
from tests.harness import tiny
from tests.harness.conftest import SMALL
from tests.harness.export.checkpoints import code_cache

Run = Callable[..., int]


@pytest.mark.parametrize("kind", sorted(tiny.CONFIGS))
@pytest.mark.parametrize("reorder", ["ssr", "none"])
def test_weights_on_a_ternary_grid_come_back_as_they_were(
    kind: str, reorder: str, words_file: Path, tmp_path: Path
) -> None:
    """One grid a row: whichever columns share a block, PT²-LLM must find it, and fp16 holds it."""
    model = tiny.make_model(kind)
    windows = torch.randint(3, tiny.VOCABULARY, (2, 24))
    expected = model(windows).logits
    run_workflow(model, tmp_path / "out", words_file, TernaryConfig(block_size=tiny.BLOCK, reorder=reorder))
    loaded = harness.load(tmp_path / "out", dense=True)
    assert torch.equal(loaded(windows).logits, expected)


def test_what_is_read_back_is_bit_for_bit_what_calibration_used(words_file: Path, tmp_path: Path) -> None:
    model = tiny.make_model("qwen3", ternary=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run_workflow(model, tmp_path / "out", words_file, TernaryConfig(block_size=tiny.BLOCK))
    assert_same_weights(harness.load(tmp_path / "out"), model)
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value) == ("_proj" not in name), name


def test_a_model_too_large_for_the_memory_gives_the_same_checkpoint(
    quantized: Path,
    llama: Path,
    words_file: Path,
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    text = (
        "--calibration",
        words_file,
        "--eval",
        words_file,
        "--eval-seqlen",
        24,
        "--block-size",
        tiny.BLOCK,
    )
    assert run_main(quantize_main, llama, "--out", tmp_path / "out", *text, *SMALL) == 0
    capsys.readouterr()
    files = sorted(file.name for file in quantized.glob("model*"))
    assert files == sorted(file.name for file in (tmp_path / "out").glob("model*"))
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (quantized / file).read_bytes()
    reports = [json.loads((folder / REPORT).read_text()) for folder in (quantized, tmp_path / "out")]
    assert reports[0]["perplexity"] == reports[1]["perplexity"]
    assert run_main(quantize_main, llama, "--method", "rtn-2bit", *text, *SMALL) == EXIT_USAGE
    assert "needs the whole model in memory" in capsys.readouterr().err


def test_code_that_comes_with_a_model_goes_into_the_checkpoint(
    llama: Path, words_file: Path, tmp_path: Path, run_main: Run
) -> None:
    source, out = shutil.copytree(llama, tmp_path / "source"), tmp_path / "out"
    (source / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        "from .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (source / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    config = json.loads((source / "config.json").read_text())
    classes = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    config.update(model_type="own", architectures=["OwnForCausalLM"], auto_map=classes)
    (source / "config.json").write_text(json.dumps(config))
    arguments = ("--out", out, "--calibration", words_file, "--trust-remote-code", *SMALL)
    with code_cache(tmp_path / "modules"):
        assert run_main(quantize_main, source, *arguments) == 0
        shutil.rmtree(source)
        assert type(harness.load(out, trust_remote_code=True)).__name__ == "OwnForCausalLM"
    with pytest.raises(UserError, match="trust_remote_code"):
        harness.load(out)


def test_a_run_prints_plan_layers_table_and_result(
    llama: Path, words_file: Path, tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code = run_main(
        quantize_main,
        llama,
        "--out",
        out,
        "--calibration",
        words_file,
        "--eval",
        words_file,
        "--eval-seqlen",
        24,
        *SMALL,
    )
    printed = capsys.readouterr().out
    assert code == 0
    assert "21 matrices" in printed
    assert "layer   3/3  7 matrices" in printed
    assert printed.count("model.layers.1.mlp.down_proj") == 1
    assert "perplexity before" in printed
    assert "perplexity after" in printed
    assert "400 tokens, 16 of 16 windows of 24 without overlap, computed in bfloat16" in printed


def test_the_report_holds_figures_settings_and_versions(quantized: Path) -> None:
    record = json.loads((quantized / REPORT).read_text())
    assert record["config"]["block_size"] == tiny.BLOCK
    assert record["calibration"]["nsamples"] == 8
    assert record["calibration"]["seed"] == 0
    assert record["calibration"]["activations_kept_in"] == "bfloat16"
    assert {"numpy", "torch", "transformers"} <= record["versions"].keys()
    assert record["perplexity"]["after"]["value"] == pytest.approx(
        record["perplexity"]["before"]["value"]
    )  # weights on the grid: the same model
    assert len(record["layers"]) == 3
    for layer in record["layers"]:
        for matrix in layer["matrices"]:
            assert matrix["relative_output_error"] == pytest.approx(0, abs=1e-9)
            weight = matrix["weight_errors"]
            assert all(b <= a for a, b in itertools.pairwise(weight))
            assert matrix["output_errors"]["aga"] <= matrix["output_errors"]["itf"] + 1e-12


@pytest.mark.parametrize("method", sorted(BASELINES))
def test_baselines_give_a_report_and_no_checkpoint(
    method: str, llama: Path, words_file: Path, tmp_path: Path, run_main: Run
) -> None:
    out = tmp_path / "out"
    code = run_main(
        quantize_main, llama, "--method", method, "--out", out, "--calibration", words_file, *SMALL
    )
    assert code == 0
    assert sorted(file.name for file in out.iterdir()) == [PAGE, REPORT]
    record = json.loads((out / REPORT).read_text())
    assert record["method"] == method
    assert record["mean_relative_output_error"] > 0
    # Nothing in it is of a ternary checkpoint that was not made.
    assert record["config"] == {"block_size": 128, "damping": 0.01}
    # Each of the 736 rows of 128 weights has one group, each of the 128 rows of 176 has two.
    assert record["bits_per_weight"] == pytest.approx(2 + 18 * (736 + 2 * 128) / (736 * 128 + 128 * 176))
    assert "plan" not in record


def test_layer_error_is_the_sum_of_errors_over_the_sum_of_powers(words_file: Path, tmp_path: Path) -> None:
    model = tiny.make_model("llama", torch.float32, ternary=False)
    record = run_workflow(model, tmp_path / "out", words_file, TernaryConfig(block_size=tiny.BLOCK))
    layer = record["layers"][2]
    errors = [m["relative_output_error"] * m["output_power"] for m in layer["matrices"]]
    powers = [m["output_power"] for m in layer["matrices"]]
    assert layer["relative_output_error"] == pytest.approx(sum(errors) / sum(powers))
    means = [entry["relative_output_error"] for entry in record["layers"]]
    assert record["mean_relative_output_error"] == pytest.approx(np.mean(means))


def test_raised_damping_is_reported(
    llama: Path, tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text of one word gives Gram matrices of rank one, which too little damping leaves singular."""
    text = tmp_path / "one.txt"
    text.write_text("w5 " * 100)
    arguments = (llama, "--out", tmp_path / "out", "--calibration", text, "--damping", "1e-17", *SMALL)
    assert run_main(quantize_main, *arguments) == 0
    assert "self_attn.q_proj: damping raised to" in capsys.readouterr().out


def test_damping_zero_with_a_singular_gram_matrix_names_the_matrix(
    llama: Path, tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "one.txt"
    text.write_text("w5 " * 100)
    arguments = (llama, "--out", tmp_path / "out", "--calibration", text, "--damping", "0", *SMALL)
    assert run_main(quantize_main, *arguments) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "error: model.layers.0." in error
    assert "not positive definite with damping 0" in error
    assert not (tmp_path / "out").exists()


def test_few_tokens_are_warned_about(
    llama: Path, words_file: Path, tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (llama, "--out", tmp_path / "out", "--calibration", words_file, *SMALL, "--nsamples", "20")
    assert run_main(quantize_main, *arguments) == 0
    assert "warning: the text has 400 tokens, 480 are requested" in capsys.readouterr().out


def test_a_float16_model_measured_before_is_still_what_is_read_back(words_file: Path, tmp_path: Path) -> None:
    model = tiny.make_model("llama", torch.float16, ternary=False)
    run_workflow(model, tmp_path / "out", words_file, TernaryConfig(), evaluation=str(words_file))
    assert_same_weights(harness.load(tmp_path / "out"), model)
    assert all(value.dtype == torch.float16 for value in model.state_dict().values())


def test_every_setting_of_the_method_is_a_switch(
    tmp_path: Path, run_main: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two command lines, as some settings rule out others."""
    changed = [
        {
            "block_size": 64,
            "reorder": "hessian",
            "itf": False,
            "aga": "conditional",
            "compensation": False,
            "damping": 0.2,
            "seed": 3,
            "grid": "int8",
            "feed_forward": True,
            "refinement": "grid",
            "shift": "none",
        },
        {"start": "twn", "max_iterations": 5, "refinement": "descent", "rounds": 2},
    ]
    assert {name for settings in changed for name in settings} == vars(TernaryConfig()).keys()
    switches = [
        "--block-size 64 --order hessian --no-itf --aga conditional --no-compensation --damping 0.2 --seed 3 "
        "--grid int8 --feed-forward --joint-grid --no-descent --shift none",
        "--start twn --max-iterations 5 --descent --rounds 2",
    ]
    seen: list[Options] = []
    monkeypatch.setattr("harness.quantize.__main__.quantize", seen.append)
    for recipe, settings in RECIPES.items():
        for arguments, wanted in zip(switches, changed, strict=True):
            assert all(value != getattr(TernaryConfig(), name) for name, value in wanted.items())
            command = f"--recipe {recipe} {arguments}".split()
            assert run_main(quantize_main, "--out", tmp_path, *command) == 0
            assert seen.pop().config == replace(settings.config, **wanted)


def assert_same_weights(loaded: torch.nn.Module, model: torch.nn.Module) -> None:
    """Dense weights of ternary layers included, which are no part of the state."""
    for name, value in model.state_dict().items():
        module, _, part = name.rpartition(".")
        assert torch.equal(getattr(loaded.get_submodule(module), part), value), name


def run_workflow(
    model: object, out: Path, words_file: Path, config: TernaryConfig, evaluation: str | None = None
) -> dict:
    """Quantize a model that is in memory, as it would be from a folder."""
    folder = tiny.save(model, out.parent / "original")
    options = Options(
        model=str(folder),
        out=out,
        backend="reference",
        calibration=str(words_file),
        nsamples=8,
        seqlen=24,
        config=config,
        evaluation=evaluation,
        evaluation_seqlen=24,
    )
    with pytest.MonkeyPatch.context() as patch:
        original = Original(model, tiny.make_tokenizer(), "tiny")
        patch.setattr("harness.quantize.prepare.load_original", lambda *args: original)
        record = quantize(options, say=lambda line: None)
    shutil.rmtree(folder)
    return record
