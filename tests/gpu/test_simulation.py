"""Launches: of which kernels, with how many threads, and in the stand-in whether at all.

The stand-in runs kernels in Numba's simulator if asked to, and as compiled for the CPU otherwise.
"""

import math

import numpy as np
import pytest

import gpu
from gpu.device import STANDIN
from gpu.kernels import alignment, descent, feedforward, fitting, packing, segments, similarity

W = np.ones((2, 5))
T = np.ones((2, 5), np.int8)
BYTES = np.full((2, 1), 121, np.uint8)
LAUNCHES = {
    "fit_rows": (fitting, ["fit_rows_kernel"], (W, 1)),
    "align_rows": (alignment, ["align_rows_kernel"], (W, T, W, W[0])),
    "feed_rows": (feedforward, ["feed_rows_kernel"], (W, W[:, :1], W[:, :1], np.eye(5))),
    "match_rows": (segments, ["match_rows_kernel"], (W, T, 0, 2)),
    "descend_rows": (descent, ["descend_rows_kernel"], (T, W, W[:, :1], np.eye(5), 5, 1)),
    "pack_rows": (packing, ["pack_rows_kernel"], (T, 5, 3)),
    "unpack_rows": (packing, ["unpack_rows_kernel"], (BYTES, 5, 5, 3)),
    "compare_columns": (
        similarity,
        ["add_rows_kernel", "add_squares_kernel", "add_products_kernel", "compare_kernel"],
        (W, np.ones(5, bool)),
    ),
    "choose_columns": (similarity, ["rank_kernel", "collect_kernel"], (W[0], 2)),
}


class Launched(list):
    """Stands for kernels: notes names where they would be launched, and blocks and threads in `sizes`."""

    def __init__(self):
        self.sizes = {}

    def kernel(self, name):
        notes = self

        class Kernel:
            def __getitem__(self, grid):
                notes.sizes[name] = grid[:2]
                return lambda *arguments: notes.append(name)

        return Kernel()


@pytest.mark.skipif(not STANDIN, reason="on a device kernels are always launched")
@pytest.mark.parametrize("function", LAUNCHES)
def test_kernels_are_launched_if_asked_for(monkeypatch, function):
    module, kernels, arguments = LAUNCHES[function]
    launched = Launched()
    for name in kernels:
        monkeypatch.setattr(module, name, launched.kernel(name))
    getattr(module, function)(*arguments)
    assert launched == []
    getattr(module, function)(*arguments, simulate=True)
    assert launched == kernels


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 577])
def test_columns_get_a_thread_each_in_blocks_of_a_warp(monkeypatch, columns):
    launched = Launched()
    for name in LAUNCHES["compare_columns"][1] + LAUNCHES["choose_columns"][1]:
        monkeypatch.setattr(similarity, name, launched.kernel(name))
    weights = gpu.to_device(np.ones((300, columns)))
    similarity.compare_columns(weights, gpu.to_device(np.ones(columns, bool)), simulate=True)
    similarity.choose_columns(weights[0], 1, simulate=True)
    warp, warps, slabs = 32, math.ceil(columns / 32), math.ceil(300 / similarity.SLAB)
    assert launched.sizes == {
        "add_rows_kernel": (300, warp),
        "add_squares_kernel": ((warps, slabs), warp),
        "add_products_kernel": ((warps, slabs), warp),
        "compare_kernel": (warps, warp),
        "rank_kernel": ((warps, math.ceil(columns / similarity.RIVALS)), warp),
        "collect_kernel": (1, warp),
    }


def test_kernels_get_strided_weights_in_one_piece():
    weights = np.random.default_rng(0).normal(size=(6, 10))[::2, ::2]
    expected = weights.T @ weights.sum(axis=1) / np.linalg.norm(weights, axis=0)
    strided = gpu.to_device(np.repeat(np.repeat(weights, 2, axis=0), 2, axis=1))[::2, ::2]
    got = similarity.compare_columns(strided, gpu.to_device(np.ones(5, bool)), simulate=True)
    np.testing.assert_allclose(gpu.to_host(got), expected, rtol=1e-12)
