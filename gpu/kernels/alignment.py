"""Activation-aware grid alignment, Eq. 12, one row per CUDA block.

Let [[a, b], [b, c]] be the system of a row and λ its larger eigenvalue; the smaller one is (ac - b²)/λ. If
that is below `SINGULAR` λ, the pseudoinverse is vvᵀ/λ, where v is the eigenvector of λ. Up to `SINGULAR`,
vvᵀ/λ equals the system divided by λ².
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda, float64, njit

from gpu.device import STANDIN, Array, xp
from gpu.kernels.lanes import CPU, CUDA, LANES, Target
from gpu.kernels.launching import launch
from reference.aga import SINGULAR


def _build(target: Target) -> Any:
    """The body for one row."""
    total, optimal_grid = target.total, target.optimal_grid

    @target.jit
    def align_row(W, T, TC, C1, symmetric, grids, row, partial, lane, lanes):
        alpha, mu = optimal_grid(W, T, row, symmetric, partial, lane, lanes)
        a = 0.0
        b = 0.0
        c = 0.0
        right_alpha = 0.0
        right_mu = 0.0
        for j in range(lane, W.shape[1], lanes):
            t = T[row, j]
            error = np.float64(W[row, j]) - (alpha * t + mu)
            a += TC[row, j] * t
            b += C1[j] * t
            c += C1[j]
            right_alpha += TC[row, j] * error
            right_mu += C1[j] * error
        a = total(partial, lane, lanes, a)
        b = total(partial, lane, lanes, b)
        c = total(partial, lane, lanes, c)
        right_alpha = total(partial, lane, lanes, right_alpha)
        right_mu = total(partial, lane, lanes, right_mu)

        if symmetric:
            if lane == 0:
                grids[row, 0] = alpha + (right_alpha / a if a > 0.0 else 0.0)
                grids[row, 1] = mu
            return
        eigenvalue = (a + c) / 2 + math.hypot((a - c) / 2, b)
        divisor = a * c - b * b
        if abs(divisor) <= SINGULAR * eigenvalue * eigenvalue:
            divisor = eigenvalue * eigenvalue
            alpha_correction = a * right_alpha + b * right_mu
            mu_correction = b * right_alpha + c * right_mu
        else:
            alpha_correction = c * right_alpha - b * right_mu
            mu_correction = a * right_mu - b * right_alpha
        if divisor == 0.0:  # a system of zeros: no correction
            divisor = 1.0
        if lane == 0:
            grids[row, 0] = alpha + alpha_correction / divisor
            grids[row, 1] = mu + mu_correction / divisor

    return align_row


if CPU is not None:
    _align_row_cpu = _build(CPU)

    @njit
    def _align_rows_cpu(W, T, TC, C1, symmetric, grids, partial):
        for row in range(W.shape[0]):
            _align_row_cpu(W, T, TC, C1, symmetric, grids, row, partial, 0, 1)


_align_row = _build(CUDA)


@cuda.jit
def align_rows_kernel(W, T, TC, C1, symmetric, grids):
    """One row per CUDA block; see `align_rows` for the arguments."""
    partial = cuda.shared.array(LANES, float64)
    _align_row(W, T, TC, C1, symmetric, grids, cuda.blockIdx.x, partial, cuda.threadIdx.x, LANES)


def align_rows(
    W: Array, T: Array, TC: Array, C1: Array, symmetric: bool = False, simulate: bool = False
) -> tuple[Array, Array]:
    """Compute the grid of every row that minimizes E_x for fixed trits (Eq. 12), as a correction of Eq. 9's.

    Parameters
    ----------
    W : (n, k) float32 or float64
        Weights of the block.
    T : (n, k) int8
        Trits.
    TC : (n, k) float64
        Trits times the Gram matrix.
    C1 : (k,) float64
        Row sums of the Gram matrix.
    symmetric : bool
        Keep mu = 0.
    simulate : bool
        In the stand-in, run the CUDA kernel in Numba's simulator instead of its body on the CPU.

    Returns
    -------
    alpha, mu : (n, 1) float64
        If the system is singular, the correction of least norm.
    """
    grids = xp.empty((W.shape[0], 2))
    arguments = (*(xp.ascontiguousarray(array) for array in (W, T, TC, C1)), symmetric, grids)
    if STANDIN and not simulate:
        _align_rows_cpu(*arguments, xp.empty(1))
    else:
        launch(align_rows_kernel, W.shape[0], *arguments)
    return grids[:, 0:1], grids[:, 1:2]
