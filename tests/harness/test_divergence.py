"""Divergence from the original against its definition, and on the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import evaluate
from harness.cli import EXIT_USAGE
from harness.compute import Compute
from harness.divergence import Reference, divergence
from harness.models.folder import REPORT
from harness.models.original import Original
from harness.perplexity import LOGIT_ROWS, from_losses, measure
from harness.quantize.__main__ import main as quantize_main
from harness.quantize.run import DIVERGENCE_WINDOWS
from tests.harness import tiny
from tests.harness.conftest import SMALL

Run = Callable[..., int]


@pytest.mark.parametrize("seqlen", [12, LOGIT_ROWS + 5])
def test_divergence_is_that_of_the_two_distributions(seqlen: int) -> None:
    torch.manual_seed(2)
    original = tiny.make_model("llama", torch.float64, ternary=False)
    other = tiny.make_model("qwen3", torch.float64, ternary=False)
    windows = torch.randint(3, tiny.VOCABULARY, (3, seqlen))
    every, agreed = [], []
    with torch.no_grad():
        for window in windows:
            p, q = (np.exp(model(window[None]).logits[0, :-1].numpy()) for model in (original, other))
            p, q = (weights / weights.sum(axis=1, keepdims=True) for weights in (p, q))
            every += [
                sum(a * math.log(a / b) for a, b in zip(*row, strict=True)) for row in zip(p, q, strict=True)
            ]
            agreed += list(p.argmax(axis=1) == q.argmax(axis=1))
    losses, found = divergence(original, other, windows)
    # Logits are compared in float32.
    assert found.mean == pytest.approx(np.mean(every), rel=1e-4)
    assert found.percentile_99 == pytest.approx(np.quantile(every, 0.99), rel=1e-4)
    assert found.agreement == np.mean(agreed)
    assert found.tokens == 3 * (seqlen - 1)
    assert from_losses(losses, windows, 0, "", other.dtype) == measure(other, windows, 0, "")


def test_a_model_does_not_diverge_from_itself() -> None:
    model = tiny.make_model("llama", torch.float32)
    _, found = divergence(model, model, torch.randint(3, tiny.VOCABULARY, (2, 20)))
    assert (found.mean, found.agreement) == (0, 1)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt"])
def test_a_reference_gives_what_both_models_together_give(kind: str) -> None:
    original = tiny.make_model(kind, torch.float32, ternary=False)
    quantized = deepcopy(original)
    with torch.no_grad():
        for name, parameter in quantized.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    windows = torch.randint(3, tiny.VOCABULARY, (3, 20))
    _, expected = divergence(original, quantized, windows)
    both = [Original(model, tiny.make_tokenizer(), "tiny") for model in (original, quantized)]
    reference = Reference.of(both.pop(0), windows, Compute(), print)
    del original  # as in a run
    found = reference.divergence_of(*both, Compute(), print)
    assert 0 < expected.mean == pytest.approx(found.mean, rel=1e-5)
    assert found.percentile_99 == pytest.approx(expected.percentile_99, rel=1e-5)
    assert (found.agreement, found.tokens) == (expected.agreement, expected.tokens)


@pytest.mark.parametrize("switches", [(), ("--eval-windows", "2")])
def test_a_run_reports_the_divergence_that_evaluate_measures(
    switches: tuple[str, ...],
    words_file: Path,
    tmp_path: Path,
    run_main: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tiny.save(tiny.make_model("llama", ternary=False), tmp_path / "original")
    text = ("--calibration", words_file, "--eval", words_file, "--eval-seqlen", 24)
    assert run_main(quantize_main, source, "--out", tmp_path / "out", *text, *SMALL, *switches) == 0
    assert "KL divergence from the original" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / REPORT).read_text())["divergence"]
    windows = int(switches[1]) if switches else DIVERGENCE_WINDOWS
    size = ("--data", words_file, "--seqlen", "24", "--windows", windows)
    assert run_main(evaluate.main, tmp_path / "out", "--original", source, "--json", *size) == 0
    measured = json.loads(capsys.readouterr().out)["divergence"]
    assert report["tokens"] == windows * 23
    assert report["mean"] == pytest.approx(measured["mean"], rel=1e-3)
    assert report["agreement"] == measured["agreement"]


def test_a_run_that_changes_the_head_measures_no_divergence(
    llama: Path, words_file: Path, tmp_path: Path, run_main: Run
) -> None:
    text = ("--calibration", words_file, "--eval", words_file, "--eval-seqlen", 24, "--embedding", "int8")
    assert run_main(quantize_main, llama, "--out", tmp_path / "out", *text, *SMALL) == 0
    assert "divergence" not in json.loads((tmp_path / "out" / REPORT).read_text())


def test_evaluate_compares_with_the_original(
    quantized: Path, llama: Path, words_file: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ("--data", words_file, "--seqlen", "32", "--windows", "2")
    assert run_main(evaluate.main, quantized, "--original", llama, "--json", *size) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["divergence"]["original"] == str(llama)
    assert run_main(evaluate.main, quantized, "--json", *size) == 0
    assert json.loads(capsys.readouterr().out).items() <= found.items()
    assert run_main(evaluate.main, quantized, "--original", llama, *size) == 0
    assert "KL divergence from" in capsys.readouterr().out


def test_a_model_with_another_vocabulary_is_not_the_original(
    quantized: Path, tmp_path: Path, words_file: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.CONFIGS["llama"]()
    config.vocab_size += 1
    model = type(tiny.make_model("llama"))(config)
    other = tiny.save(model, tmp_path / "other")
    size = ("--data", words_file, "--seqlen", "32", "--windows", "2")
    assert run_main(evaluate.main, quantized, "--original", other, *size) == EXIT_USAGE
    assert "it is not its original" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["missing", "streamed"])
def test_an_original_that_cannot_be_compared_is_refused_before_anything_is_measured(
    kind: str,
    quantized: Path,
    llama: Path,
    words_file: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluate, "divergence_on", lambda *arguments, **rest: pytest.fail("measured"))
    if kind == "streamed":
        monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    original = llama if kind == "streamed" else "./nowhere"
    assert run_main(evaluate.main, quantized, "--original", original, "--data", words_file) == EXIT_USAGE
    assert ("too large" if kind == "streamed" else "does not exist") in capsys.readouterr().err
