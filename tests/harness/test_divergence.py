"""Divergence from the original against its definition, and on the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import evaluate
from harness.cli import EXIT_USAGE
from harness.divergence import divergence
from harness.perplexity import LOGIT_ROWS, from_losses, measure
from tests.harness import tiny

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
