"""Architectures of transformers at a small size, from a configuration to a checkpoint that is read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from harness.architectures import configs
from harness.architectures.__main__ import main
from harness.architectures.check import (
    CAUSAL,
    DONE,
    FAILED,
    NOT_BUILT,
    REFUSED,
    TABLES,
    VISION,
    Outcome,
    check,
)
from harness.cli import EXIT_MISS, EXIT_USAGE

TABLES_FOLDER = Path(__file__).parents[2] / "benchmarks"
REPRESENTATIVE = (
    *("llama", "qwen3", "gemma3_text", "gpt2", "phi3", "opt"),
    *("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "bamba", "lfm2"),
)


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_an_architecture_is_ternarized_and_read_back(model_type: str) -> None:
    outcome = check(model_type)
    assert outcome.outcome == DONE, outcome.reason
    assert outcome.left == ""
    assert outcome.ternarized
    assert outcome.ternarized > 0.9


@pytest.mark.parametrize("model_type", ["idefics3", "qwen3_omni_moe_thinker", "gemma4", "llama4"])
def test_a_model_of_images_and_text_is_ternarized_and_read_back(model_type: str) -> None:
    """The second one initializes its fused experts by their names; the third has infinite bounds."""
    outcome = check(model_type, VISION)
    assert outcome.outcome == DONE, outcome.reason
    assert outcome.left == ""


def test_layers_that_text_skips_are_left_and_named() -> None:
    outcome = check("mllama", VISION)
    assert outcome.outcome == DONE, outcome.reason
    layers = transformers.AutoModelForImageTextToText.from_config(configs.small_config("mllama"))
    skipped = sum(p.numel() for p in layers.model.language_model.layers[1].parameters())
    assert outcome.left == (
        f"{skipped / 1e6:.2f} M weights of layers of model.language_model.layers that text alone does not go "
        "through: 1"
    )


def test_a_type_is_of_the_table_that_is_walked(
    run_main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(main, "--only", "idefics3") == EXIT_USAGE
    assert "idefics3 is not in the table of AutoModelForCausalLM" in capsys.readouterr().err


def test_an_encoder_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs._SIZES, "is_decoder", False)
    outcome = check("bert")
    assert (outcome.outcome, outcome.ternarized) == (REFUSED, None)
    assert "not a causal language model" in outcome.reason


def test_a_model_that_differs_when_it_is_read_back_fails(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    run_main: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from harness.ternary.linear import TernaryLinear

    dequantize = TernaryLinear.dequantize
    monkeypatch.setattr(TernaryLinear, "dequantize", lambda self: 1.5 * dequantize(self))
    file = tmp_path / "table.json"
    assert run_main(main, file, "--only", "llama") == EXIT_MISS
    assert "logits differ by up to" in capsys.readouterr().out
    row = json.loads(file.read_text())["architectures"][0]
    assert (row["model_type"], row["outcome"]) == ("llama", FAILED)


def test_single_rows_of_a_table_are_replaced(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    run_main: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = {"mixtral": DONE, "llama": DONE}

    def found(model_type: str, auto: str) -> Outcome:
        return Outcome(model_type, "Class", known[model_type], "why" * (known[model_type] != DONE))

    monkeypatch.setattr("harness.architectures.__main__.check", found)
    file = tmp_path / "table.json"
    assert run_main(main, file, "--only", "mixtral", "llama") == 0
    known["llama"] = REFUSED
    assert run_main(main, file, "--only", "llama") == 0
    table = json.loads(file.read_text())
    # In the order of transformers' table.
    assert [(row["model_type"], row["outcome"]) for row in table["architectures"]] == [
        ("llama", REFUSED),
        ("mixtral", DONE),
    ]
    assert table["totals"] == "1 refused, 1 done, 50% of the 2 that could be built"
    for arguments, changed, reason in (
        (("--only", "idefics3", "--auto", VISION), {}, f"is not of the table of {VISION}"),
        (("--only", "llama"), {"versions": {}}, "is of other versions"),
    ):
        before = json.dumps({**table, **changed})
        file.write_text(before)
        assert run_main(main, file, *arguments) == EXIT_USAGE
        assert reason in capsys.readouterr().err
        assert file.read_text() == before


def test_what_cannot_be_built_is_told_from_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise ValueError("no such size")

    monkeypatch.setattr("harness.architectures.check.small_config", refuse)
    assert check("llama") == Outcome("llama", "LlamaForCausalLM", NOT_BUILT, "ValueError: no such size")


@pytest.mark.parametrize(
    ("name", "auto"), [("architectures.json", CAUSAL), ("architectures-vision.json", VISION)]
)
def test_a_table_holds_the_architectures_and_nine_in_ten_pass(name: str, auto: str) -> None:
    table = json.loads((TABLES_FOLDER / name).read_text())
    outcomes = {row["model_type"]: row["outcome"] for row in table["architectures"]}
    if table["versions"]["transformers"] == transformers.__version__:
        assert set(outcomes) == set(TABLES[auto])
    built = [outcome for outcome in outcomes.values() if outcome != NOT_BUILT]
    assert FAILED not in built
    assert built.count(DONE) >= 0.9 * len(built)
    assert all(row.get("reason") for row in table["architectures"] if row["outcome"] != DONE)
