"""What a report counts of trits, alpha and mu is what the checkpoint holds."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.calibration.layerwise import FittedMatrix
from harness.inspect import describe
from harness.models.folder import REPORT
from harness.quantize.histograms import grid_histograms
from harness.ternary.reading import tensors_of
from reference.types import CodedGrid, TernaryMatrix


def test_trits_are_counted_as_the_checkpoint_has_them(quantized: Path) -> None:
    stored = {layer.name: list(layer.counts) for layer in describe(quantized)["layers"]}
    report = json.loads((quantized / REPORT).read_text())
    assert {m["name"]: m["trits"] for layer in report["layers"] for m in layer["matrices"]} == stored


def test_alpha_and_mu_are_counted_as_the_checkpoint_has_them(quantized: Path) -> None:
    stored = dict(tensors_of(quantized))
    report = json.loads((quantized / REPORT).read_text())
    for layer in report["layers"]:
        assert len(layer["grid"]) == len(layer["matrices"]) == 7
        for kind, grid in layer["grid"].items():
            name = f"model.layers.{layer['layer']}.{kind}"
            scale, shift = (stored[f"{name}.{part}"].flatten().tolist() for part in ("scale", "shift"))
            pairs = list(zip(scale, shift, strict=True))
            alphas = Counter(math.floor(4 * math.log2(abs(alpha))) for alpha, _ in pairs if alpha)
            mus = Counter(math.floor(8 * mu / abs(alpha)) for alpha, mu in pairs if alpha)
            assert counted(grid["alpha"]) == alphas
            assert counted(grid["mu"]) == {max(-32, min(31, place)): n for place, n in mus.items()}
            assert grid["constant"] == sum(alpha == 0 for alpha, _ in pairs)


def counted(histogram: dict[str, Any]) -> dict[int, int]:
    return {place: n for place, n in enumerate(histogram["counts"], histogram["first"]) if n}


def fitted(name: str, alpha: list[float], mu: list[float] | None, coded: bool = False) -> FittedMatrix:
    """A matrix with one block a row."""

    def grid(values: list[float]) -> Any:
        column = torch.tensor(values)[:, None].numpy()
        if not coded:
            return column.astype("float16")
        one = torch.ones(1, 1, dtype=torch.float16)
        return CodedGrid(column.astype("int8"), one.expand(len(values), 1).numpy(), one.numpy())

    trits = torch.zeros(len(alpha), 4, dtype=torch.int8).numpy()
    shift = None if mu is None else grid(mu)
    result = TernaryMatrix(trits, grid(alpha), shift, torch.arange(4).numpy(), 4)
    empty = torch.empty(0)
    return FittedMatrix(name, empty, result, 0.0, 0, 0, {})


@pytest.mark.parametrize("coded", [False, True])
def test_bins_have_their_lower_ends_and_experts_share_them(coded: bool) -> None:
    """1 and 2 lie on the lower ends of bins; a negative alpha counts by its magnitude."""
    matrices = [
        fitted("m.0.experts.0.up", [1, 2, -2, 0], [1, -1, 20, 5], coded),
        fitted("m.0.experts.1.up", [3, 1], [0, -9], coded),
    ]
    (grid,) = grid_histograms(matrices).values()
    assert counted(grid["alpha"]) == {0: 2, 4: 2, 6: 1}
    assert counted(grid["mu"]) == {8: 1, -4: 1, 31: 1, 0: 1, -32: 1}
    assert grid["constant"] == 1
    assert list(grid_histograms(matrices)) == ["experts.*.up"]


def test_without_a_shift_there_is_no_histogram_of_it_and_without_alpha_an_empty_one() -> None:
    grid = grid_histograms([fitted("m.0.up", [0, 0], None)])["up"]
    assert grid == {"alpha": {"first": 0, "counts": []}, "constant": 2}


def test_a_dense_matrix_has_no_histogram() -> None:
    empty = torch.empty(0)
    assert grid_histograms([FittedMatrix("m.0.up", empty, empty.numpy(), 0.0, 0, 0, {})]) == {}
