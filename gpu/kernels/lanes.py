"""Shared by the Numba kernels: one source for two compilers, what lanes find out together, Eq. 9 and Eq. 10.

The body of a kernel is plain Numba, compiled twice: for CUDA, with LANES lanes and real barriers, and for the
CPU, with one lane and no barriers. The CPU version stands in for CUDA at full matrix sizes; Numba's simulator
runs the CUDA version.

If lanes share a row, lane l takes the columns l, l + lanes, l + 2 lanes, ... Partial sums go through shared
memory, and every lane adds them in the same order. So all lanes hold the same bits, take the same branches
and reach the same barriers, and results are reproducible byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, njit

from gpu.device import STANDIN

# One warp per block: a barrier within one warp costs almost nothing.
LANES = 32


class Target(NamedTuple):
    """A compiler of kernel bodies, and the functions that the bodies call."""

    jit: Callable[..., Any]
    barrier: Any
    total: Any  # the sum over all lanes
    least: Any  # the least integer of all lanes
    optimal_grid: Any  # alpha and mu of a row by Eq. 9, or alpha alone
    nearest: Any  # the trit of a weight by Eq. 10


def _target(jit: Callable[..., Any], barrier: Any) -> Target:
    @jit
    def total(partial, lane, lanes, value):
        partial[lane] = value
        barrier()
        result = 0.0
        for other in range(lanes):
            result += partial[other]
        barrier()
        return result

    @jit
    def least(partial, lane, lanes, value):
        partial[lane] = value
        barrier()
        result = partial[0]
        for other in range(1, lanes):
            result = min(result, partial[other])
        barrier()
        return result

    @jit
    def optimal_grid(W, T, row, symmetric, partial, lane, lanes):
        m = W.shape[1]
        weights = 0.0
        t1 = 0.0
        tt1 = 0.0
        for j in range(lane, m, lanes):
            weights += np.float64(W[row, j])
            t1 += T[row, j]
            tt1 += abs(T[row, j])
        mean = total(partial, lane, lanes, weights) / m
        t1 = total(partial, lane, lanes, t1)
        tt1 = total(partial, lane, lanes, tt1)
        if symmetric:
            mean = 0.0
        wt1 = 0.0
        for j in range(lane, m, lanes):
            wt1 += (np.float64(W[row, j]) - mean) * T[row, j]
        wt1 = total(partial, lane, lanes, wt1)
        if symmetric:
            return wt1 / max(tt1, 1.0), 0.0
        denominator = m * tt1 - t1 * t1  # sums of small integers, exact
        alpha = 0.0
        if denominator != 0.0:
            alpha = m * wt1 / denominator
        return alpha, mean - alpha * t1 / m

    @jit
    def nearest(centred, alpha):
        if alpha == 0.0 or not abs(centred) > abs(alpha) / 2:
            return 0
        if (centred < 0) != (alpha < 0):
            return -1
        return 1

    return Target(jit, barrier, total, least, optimal_grid, nearest)


def _barrier():
    cuda.syncthreads()


def _no_barrier():
    pass


CUDA = _target(cuda.jit(device=True), cuda.jit(device=True)(_barrier))
CPU = _target(njit, njit(_no_barrier)) if STANDIN else None
