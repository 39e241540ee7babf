"""Ternary initialization and the whole ITF loop of a block, Eq. 4-10, one row per CUDA block."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, float64, njit

from gpu.device import STANDIN, Array, xp
from gpu.kernels.lanes import CPU, CUDA, LANES, Target
from gpu.kernels.launching import launch
from reference.twn import THRESHOLD


def _build(target: Target) -> Any:
    """The body for one row."""
    jit, total, build_optimal_grid, nearest = target.jit, target.total, target.optimal_grid, target.nearest

    @jit
    def record(W, T, row, alpha, mu, errors, step, partial, lane, lanes):
        # Eq. 6 of this row
        error = 0.0
        for j in range(lane, W.shape[1], lanes):
            difference = np.float64(W[row, j]) - (alpha * T[row, j] + mu)
            error += difference * difference
        error = total(partial, lane, lanes, error)
        if lane == 0:
            errors[step, row] = error
        return error

    @jit
    def initialize(W, T, row, twn, partial, lane, lanes):
        m = W.shape[1]
        mu = 0.0
        if not twn:  # Eq. 4
            mean = 0.0
            for j in range(lane, m, lanes):
                mean += np.float64(W[row, j])
            mu = total(partial, lane, lanes, mean) / m
        magnitude = 0.0
        for j in range(lane, m, lanes):
            magnitude += abs(np.float64(W[row, j]) - mu)
        delta = THRESHOLD * (total(partial, lane, lanes, magnitude) / m)  # Eq. 5, Eq. 3
        kept = 0.0
        matched = 0.0
        for j in range(lane, m, lanes):  # Eq. 2
            centred = np.float64(W[row, j]) - mu
            t = 0
            if centred > delta:
                t = 1
            elif centred < -delta:
                t = -1
            T[row, j] = t
            kept += abs(t)
            matched += t * centred
        kept = total(partial, lane, lanes, kept)
        matched = total(partial, lane, lanes, matched)
        return matched / max(kept, 1.0), mu

    @jit
    def flexible_round(W, T, row, alpha, mu, partial, lane, lanes):
        changed = 0.0
        for j in range(lane, W.shape[1], lanes):
            t = nearest(np.float64(W[row, j]) - mu, alpha)
            if t != T[row, j]:
                changed = 1.0
                T[row, j] = t
        return total(partial, lane, lanes, changed) != 0.0

    @jit
    def fit_row(W, start, twn, symmetric, limit, grids, T0, T, errors, steps, row, partial, lane, lanes):
        if start:
            alpha, mu = grids[row, 0], grids[row, 1]
        else:
            alpha, mu = initialize(W, T0, row, twn, partial, lane, lanes)
            if lane == 0:
                grids[row, 0] = alpha
                grids[row, 1] = mu
        for j in range(lane, W.shape[1], lanes):
            T[row, j] = T0[row, j]
        error = record(W, T, row, alpha, mu, errors, 0, partial, lane, lanes)
        step = 1
        changed = True
        rounds = 0
        while changed and rounds < limit:
            alpha, mu = build_optimal_grid(W, T, row, symmetric, partial, lane, lanes)
            record(W, T, row, alpha, mu, errors, step, partial, lane, lanes)
            changed = flexible_round(W, T, row, alpha, mu, partial, lane, lanes)
            error = record(W, T, row, alpha, mu, errors, step + 1, partial, lane, lanes)
            step += 2
            rounds += 1
        if changed and limit > 0:  # stopped by the limit: recompute the grid for the last trits
            alpha, mu = build_optimal_grid(W, T, row, symmetric, partial, lane, lanes)
            error = record(W, T, row, alpha, mu, errors, step, partial, lane, lanes)
            step += 1
        if lane == 0:
            grids[row, 2] = alpha
            grids[row, 3] = mu
            steps[row] = step
        for later in range(step + lane, errors.shape[0], lanes):
            errors[later, row] = error

    return fit_row


if CPU is not None:
    _fit_row_cpu = _build(CPU)

    @njit
    def _fit_rows_cpu(W, start, twn, symmetric, limit, grids, T0, T, errors, steps, partial):
        for row in range(W.shape[0]):
            _fit_row_cpu(W, start, twn, symmetric, limit, grids, T0, T, errors, steps, row, partial, 0, 1)


_fit_row = _build(CUDA)


@cuda.jit
def fit_rows_kernel(W, start, twn, symmetric, limit, grids, T0, T, errors, steps):
    """One row per CUDA block; see `fit_rows` for the arguments."""
    partial = cuda.shared.array(LANES, float64)
    _fit_row(
        W,
        start,
        twn,
        symmetric,
        limit,
        grids,
        T0,
        T,
        errors,
        steps,
        cuda.blockIdx.x,
        partial,
        cuda.threadIdx.x,
        LANES,
    )


def fit_rows(
    W: Array,
    limit: int,
    start: tuple[Array, Array, Array] | None = None,
    twn: bool = False,
    symmetric: bool = False,
    simulate: bool = False,
) -> tuple[Array, Array, Array, Array, Array]:
    """Initialize every row of a block, then alternate grid and rounding until its trits no longer change.

    Parameters
    ----------
    W : (n, k) float32 or float64
        Weights of the block. Sums and grids are float64 in either case.
    limit : int
        Maximum rounds of ITF; 0 for the initialization alone.
    start : (alpha, mu, T), optional
        Initial (n, 1) grids and (n, k) trits, instead of the initialization.
    twn : bool
        Initialize by Eq. 1-3 with mu = 0 instead of Eq. 4-5.
    symmetric : bool
        Keep mu = 0 after the start, which must have it too.
    simulate : bool
        In the stand-in, run the CUDA kernel in Numba's simulator instead of its body on the CPU.

    Returns
    -------
    grids : (n, 4) float64
        alpha and mu at the start, alpha and mu at the end.
    T0, T : (n, k) int8
        Trits at the start and at the end.
    errors : (2 limit + 2, n) float64
        E_w of every row at the start and after every half-step, the last value repeated.
    steps : (n,) int32
        Half-steps recorded for every row, the start included.
    """
    n, k = W.shape
    grids = xp.empty((n, 4))
    T0, T = xp.empty((n, k), xp.int8), xp.empty((n, k), xp.int8)
    errors, steps = xp.empty((2 * limit + 2, n)), xp.empty(n, xp.int32)
    if start is not None:
        grids[:, 0:1], grids[:, 1:2], T0[:] = start
    flags = start is not None, twn, symmetric
    arguments = (xp.ascontiguousarray(W), *flags, limit, grids, T0, T, errors, steps)
    if STANDIN and not simulate:
        _fit_rows_cpu(*arguments, xp.empty(1))
    else:
        launch(fit_rows_kernel, n, *arguments)
    return grids, T0, T, errors, steps
