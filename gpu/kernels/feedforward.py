"""Rounding fed forward inside a block, one row per CUDA block.

All lanes round a column, and share the columns after it. Weights stay in global memory: those of a row and
block fill a few cache lines, and U is read by all rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, njit

from gpu.device import STANDIN, Array, xp
from gpu.kernels.lanes import CPU, CUDA, LANES, Target
from gpu.kernels.launching import launch


def _build(target: Target) -> Any:
    """The body for one row."""
    barrier, nearest = target.barrier, target.nearest

    @target.jit
    def feed_row(W, grids, U, T, row, lane, lanes):
        alpha, mu = grids[row, 0], grids[row, 1]
        for j in range(W.shape[1]):
            weight = W[row, j]
            t = nearest(weight - mu, alpha)
            if lane == 0:
                T[row, j] = t
            error = (weight - (alpha * t + mu)) / U[j, j]
            for later in range(j + 1 + lane, W.shape[1], lanes):
                W[row, later] -= error * U[j, later]
            barrier()

    return feed_row


if CPU is not None:
    _feed_row_cpu = _build(CPU)

    @njit
    def _feed_rows_cpu(W, grids, U, T):
        for row in range(W.shape[0]):
            _feed_row_cpu(W, grids, U, T, row, 0, 1)


_feed_row = _build(CUDA)


@cuda.jit
def feed_rows_kernel(W, grids, U, T):
    """One row per CUDA block; overwrites W. See `feed_rows` for the arguments."""
    _feed_row(W, grids, U, T, cuda.blockIdx.x, cuda.threadIdx.x, LANES)


def feed_rows(W: Array, alpha: Array, mu: Array, L: Array, simulate: bool = False) -> Array:
    """Round column after column by Eq. 10, and move each error into the columns after it.

    Parameters
    ----------
    W : (n, k) float32 or float64
        Weights of the block.
    alpha, mu : (n, 1) float64
        Grid.
    L : (k, k) float64
        Lower Cholesky factor of the block's part of the inverse of H, the transpose of U.
    simulate : bool
        In the stand-in, run the CUDA kernel in Numba's simulator instead of its body on the CPU.

    Returns
    -------
    T : (n, k) int8
    """
    T = xp.empty(W.shape, xp.int8)
    weights = xp.array(W, np.float64, order="C")
    arguments = (weights, xp.concatenate([alpha, mu], axis=1), xp.ascontiguousarray(L.T), T)
    if STANDIN and not simulate:
        _feed_rows_cpu(*arguments)
    else:
        launch(feed_rows_kernel, W.shape[0], *arguments)
    return T
