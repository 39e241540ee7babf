"""A backend against the reference on a whole small model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import text
from harness.backends import Backend, load_backend
from harness.verify.real_model import compare_on_model
from reference.types import TernaryMatrix
from tests.harness import tiny

SIZE = {"nsamples": 8, "seqlen": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Off any ternary grid, so that there are errors to compare."""
    return tiny.save(tiny.make_model("llama", ternary=False), tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in text has no word that the tiny tokenizer knows."""
    stream = text.Text(tiny.words(400), "words")
    monkeypatch.setattr(text, "read_text", lambda *arguments: stream)


class Changed(Backend):
    """The reference, but for what `change` makes of matrices as wide as `columns`."""

    columns, change = tiny.INNER, staticmethod(lambda result: result)

    def ternarize(self, *arguments: Any) -> TernaryMatrix:
        result = super().ternarize(*arguments)
        return self.change(result) if result.trits.shape[1] == self.columns else result


def backend_that(change: Any) -> Backend:
    made = Changed("reference", load_backend("reference").package)
    object.__setattr__(made, "change", change)
    return made


def test_the_reference_agrees_with_itself(model: Path) -> None:
    result = compare_on_model(str(model), load_backend("reference"), **SIZE)
    assert result["passed"]
    assert result["matrices"] == 3 * 7
    assert result["model"] == str(model)
    assert result["largest_difference"]["difference"] == 0
    assert result["fewest_equal_trits"]["equal_trits"] == 1
    assert result["misses"] == []
    perplexity = result["perplexity"]
    assert perplexity["by the reference"] == perplexity["by the backend"] != perplexity["original"]


def test_other_scales_are_missed_by_name(model: Path) -> None:
    def change(result: TernaryMatrix) -> TernaryMatrix:
        return replace(result, scale=np.nextafter(result.scale, np.float16(9)) * np.float16(1.01))

    result = compare_on_model(str(model), backend_that(change), **SIZE)
    assert not result["passed"]
    names = {f"model.layers.{layer}.mlp.down_proj" for layer in range(3)}
    assert {row["matrix"] for row in result["misses"]} == names
    assert result["largest_difference"]["matrix"] in names
    assert result["fewest_equal_trits"]["equal_trits"] == 1
    assert result["perplexity"]["by the reference"] != result["perplexity"]["by the backend"]


def test_trits_that_differ_are_counted(model: Path) -> None:
    def change(result: TernaryMatrix) -> TernaryMatrix:
        trits = result.trits.copy()
        trits[0, 0] = -1 if trits[0, 0] == 1 else 1
        return replace(result, trits=trits)

    result = compare_on_model(str(model), backend_that(change), **SIZE)
    one = 1 / (tiny.WIDTH * tiny.INNER)
    assert result["fewest_equal_trits"]["equal_trits"] == pytest.approx(1 - one, rel=1e-12)
    assert result["mean_share_of_equal_trits"] == pytest.approx(1 - 3 * one / 21, rel=1e-12)
