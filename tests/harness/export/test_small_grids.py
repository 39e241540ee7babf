"""Exports lose no more of small alpha and mu than the checkpoint did: all are multiples of one least step."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from harness.export.gguf_types import pack
from harness.export.hqq import pack_hqq
from harness.export.source import Rounding
from reference.types import TernaryMatrix

LEAST = 2.0**-24


@pytest.fixture
def matrix() -> TernaryMatrix:
    """Every alpha and mu from 0 to 15 least steps, of both signs."""
    rng = np.random.default_rng(0)
    alpha, mu = np.meshgrid(np.arange(-15, 16), np.arange(-15, 16))
    scale, shift = ((part.reshape(-1, 1) * LEAST).astype(np.float16) for part in (alpha, mu))
    trits = rng.integers(-1, 2, (961, 32)).astype(np.int8)
    return TernaryMatrix(
        np.repeat(trits, 4, 0), np.repeat(scale, 4, 0), np.repeat(shift, 4, 0), np.arange(32), 32
    )


def exact(matrix: TernaryMatrix) -> np.ndarray:
    return matrix.scale.astype(np.float64) * matrix.trits + matrix.shift.astype(np.float64)


def test_q4_1_holds_small_grids_exactly(matrix: TernaryMatrix) -> None:
    packed = pack(matrix, "Q4_1", "m", Rounding())
    read = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
    assert np.array_equal(read.astype(np.float64), exact(matrix))


def test_hqq_holds_small_grids_within_the_rounding_of_its_zero(matrix: TernaryMatrix) -> None:
    packed = pack_hqq(matrix, 32, Rounding())
    quarters = [packed["W_q"] >> shift & 3 for shift in (6, 4, 2, 0)]
    digits = np.concatenate(quarters).astype(np.float64)
    read = (digits - packed["zero"].astype(np.float64)) * packed["scale"].astype(np.float64)
    wanted = exact(matrix)
    # Half a unit of zero, which is at most 16 here, in units of alpha; less than a tenth of a least step.
    assert np.abs(read - wanted).max() <= 16 * 2.0**-11 * 15 * LEAST
