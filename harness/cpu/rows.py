"""Loops over the rows of a block, compiled by Numba: Algorithm 1, Eq. 12, and rounding fed forward.

Sums may be reordered (``reassoc``), so that they run in vector registers; they differ from the reference's in
the last digits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.cpu.compiled import compiled
from reference.aga import SINGULAR
from reference.twn import THRESHOLD

_compiled = compiled({"reassoc", "contract", "nsz"})


@_compiled
def fit_rows(W: Any, limit: int, twn: bool, symmetric: bool) -> Any:
    """Initialize every row of a block, and run ITF on it.

    Parameters
    ----------
    W : (n, k) float64 array
        Weights of the block, in C order.
    limit : int
        Most rounds; 0 for the initialization alone.
    twn : bool
        Whether to start from Eq. 1-3 with mu = 0 instead of Eq. 4-5.
    symmetric : bool
        Whether mu is 0 throughout.

    Returns
    -------
    start, grid : (n, 2) float64 arrays
        alpha and mu after the initialization, and after ITF.
    T_start, T : (n, k) int8 arrays
    errors : (2·limit + 2,) float64 array
        E_w at the start and after every half-step, summed over rows.
    steps : int
        Entries of `errors` that count.
    """
    n, k = W.shape
    start, grid = np.empty((n, 2)), np.empty((n, 2))
    T_start, T = np.zeros((n, k), np.int8), np.zeros((n, k), np.int8)
    errors = np.zeros(2 * limit + 2)
    curve = np.empty(2 * limit + 2)
    steps = 1
    for i in range(n):
        w = W[i]
        t = T[i]
        mean = 0.0
        for j in range(k):
            mean += w[j]
        mean = 0.0 if symmetric else mean / k
        mu = 0.0 if twn else mean
        size = 0.0
        for j in range(k):
            size += abs(w[j] - mu)
        delta = THRESHOLD * (size / k)
        total, kept = 0.0, 0
        for j in range(k):
            centred = w[j] - mu
            beyond = abs(centred) > delta
            t[j] = 0 if not beyond else (1 if centred > 0 else -1)
            if beyond:
                total += abs(centred)
                kept += 1
        alpha = total / max(kept, 1)
        start[i, 0], start[i, 1] = alpha, mu
        T_start[i] = t
        curve[0] = _row_error(w, alpha, mu, t)
        taken = 1
        for step in range(limit):
            alpha, mu = _row_grid(w, t, mean, symmetric)
            curve[taken] = _row_error(w, alpha, mu, t)
            changed = False
            sign = np.sign(alpha)
            half = abs(alpha) / 2
            for j in range(k):
                centred = w[j] - mu
                rounded = np.int8(0 if not abs(centred) > half else (sign if centred > 0 else -sign))
                changed |= rounded != t[j]
                t[j] = rounded
            curve[taken + 1] = _row_error(w, alpha, mu, t)
            taken += 2
            if not changed:
                break
            if step == limit - 1:
                alpha, mu = _row_grid(w, t, mean, symmetric)
                curve[taken] = _row_error(w, alpha, mu, t)
                taken += 1
        grid[i, 0], grid[i, 1] = alpha, mu
        for s in range(len(errors)):
            errors[s] += curve[min(s, taken - 1)]
        steps = max(steps, taken)
    return start, T_start, grid, T, errors, steps


@_compiled
def _row_grid(w: Any, t: Any, mean: float, symmetric: bool) -> tuple[float, float]:
    """Eq. 9 for one row, centred as in `reference.atq.build_optimal_grid`; if symmetric, the mean is 0."""
    k = len(w)
    ones, squares, product = 0, 0, 0.0
    for j in range(k):
        ones += t[j]
        squares += abs(t[j])
        product += (w[j] - mean) * t[j]
    if symmetric:
        return product / max(squares, 1), 0.0
    denominator = k * squares - ones * ones
    alpha = 0.0 if denominator == 0 else k * product / denominator
    return alpha, mean - alpha * ones / k


@_compiled
def _row_error(w: Any, alpha: float, mu: float, t: Any) -> float:
    total = 0.0
    for j in range(len(w)):
        residual = w[j] - (alpha * t[j] + mu)
        total += residual * residual
    return total


@_compiled
def align_rows(W: Any, T: Any, TC: Any, C1: Any, symmetric: bool) -> Any:
    """Solve Eq. 12 for every row, as `reference.aga.align_grid` does.

    Parameters
    ----------
    W : (n, k) float64 array
        Weights.
    T : (n, k) int8 array
        Trits.
    TC : (n, k) float64 array
        T @ C.
    C1 : (k,) float64 array
        Row sums of C.
    symmetric : bool
        Whether mu is 0.

    Returns
    -------
    (n, 2) float64 array
        alpha and mu.
    """
    n, k = W.shape
    grid = np.empty((n, 2))
    d = 0.0
    for j in range(k):
        d += C1[j]
    for i in range(n):
        w, t = W[i], T[i]
        mean = 0.0
        if not symmetric:
            for j in range(k):
                mean += w[j]
        alpha, mu = _row_grid(w, t, mean / k, symmetric)
        a, b, of_t, of_1 = 0.0, 0.0, 0.0, 0.0
        for j in range(k):
            residual = w[j] - (alpha * t[j] + mu)
            a += TC[i, j] * t[j]
            b += C1[j] * t[j]
            of_t += TC[i, j] * residual
            of_1 += C1[j] * residual
        if symmetric:
            grid[i, 0], grid[i, 1] = alpha + (of_t / a if a > 0 else 0.0), mu
            continue
        middle = (a + d) / 2
        larger = middle + np.hypot((a - d) / 2, b)
        if larger > 0:
            determinant = a * d - b * b
            if determinant > SINGULAR * larger * larger:
                alpha += (d * of_t - b * of_1) / determinant
                mu += (a * of_1 - b * of_t) / determinant
            else:  # the system has rank 1: correct along its eigenvector alone
                x, y = (larger - d, b) if a > d else (b, larger - a)
                along = (x * of_t + y * of_1) / ((x * x + y * y) * larger)
                alpha += x * along
                mu += y * along
        grid[i, 0], grid[i, 1] = alpha, mu
    return grid


@_compiled
def feed_forward_rows(W: Any, grid: Any, U: Any) -> Any:
    """Round every row of a block as `reference.feedforward.round_fed_forward` does.

    Parameters
    ----------
    W : (n, k) float64 array
        Weights.
    grid : (n, 2) float64 array
        alpha and mu.
    U : (k, k) float64 array
        Upper triangular, in C order; UᵀU is the block's part of the inverse of H.

    Returns
    -------
    (n, k) int8 array
    """
    n, k = W.shape
    T = np.empty((n, k), np.int8)
    for i in range(n):
        alpha, mu = grid[i]
        w = W[i].copy()
        sign = np.sign(alpha)
        half = abs(alpha) / 2
        for j in range(k):
            centred = w[j] - mu
            t = 0.0 if not abs(centred) > half else (sign if centred > 0 else -sign)
            T[i, j] = np.int8(t)
            error = (w[j] - (alpha * t + mu)) / U[j, j]
            for later in range(j + 1, k):
                w[later] -= error * U[j, later]
    return T
