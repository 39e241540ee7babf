"""Asymmetric ternary quantizer, Section 3.2 (Eq. 4-10) and Algorithm 1; see `reference.atq`."""

from __future__ import annotations

import numpy as np

from gpu import checks
from gpu.device import Array, xp
from gpu.kernels.fitting import fit_rows
from gpu.twin import twin


@twin
def ternary_init(W: Array) -> tuple[Array, Array, Array]:
    grids, T, _, _, _ = fit_rows(checks.matrix(W, "W"), 0)
    return grids[:, 0:1], grids[:, 1:2], T


@twin
def weight_error(W: Array, alpha: Array, mu: Array, T: Array) -> float:
    return float(squared_norm(residual(*_checked(W, alpha, mu, T))))


@twin
def weight_error_gradient(W: Array, alpha: Array, mu: Array, T: Array) -> tuple[Array, Array]:
    W, alpha, mu, T = _checked(W, alpha, mu, T)
    E = residual(W, alpha, mu, T)
    return -2 * (E * T).sum(axis=1, keepdims=True), -2 * E.sum(axis=1, keepdims=True)


@twin
def build_optimal_grid(W: Array, T: Array, symmetric: bool = False) -> tuple[Array, Array]:
    W = checks.matrix(W, "W")
    T = checks.trits(T, W.shape)
    m = W.shape[1]
    TT1 = abs(T).sum(axis=1, keepdims=True, dtype=np.int64)
    if symmetric:
        alpha = (W * T).sum(axis=1, keepdims=True, dtype=np.float64) / xp.maximum(TT1, 1)
        return alpha, xp.zeros_like(alpha)
    mean = W.mean(axis=1, keepdims=True, dtype=np.float64)
    T1 = T.sum(axis=1, keepdims=True, dtype=np.int64)
    denominator = m * TT1 - T1**2
    WT1 = ((W - mean) * T).sum(axis=1, keepdims=True)
    alpha = xp.where(denominator == 0, 0.0, m * WT1 / xp.maximum(denominator, 1))
    return alpha, mean - alpha * T1 / m


@twin
def flexible_round(W: Array, alpha: Array, mu: Array) -> Array:
    W = checks.matrix(W, "W")
    alpha = checks.column(alpha, W.shape[0], "alpha")
    centred = W - checks.column(mu, W.shape[0], "mu")
    beyond = abs(centred) > abs(alpha) / 2
    return xp.where(beyond, xp.sign(centred) * xp.sign(alpha), 0.0).astype(np.int8)


@twin
def iterative_ternary_fitting(
    W: Array,
    max_iterations: int = 100,
    start: tuple[Array, Array, Array] | None = None,
    symmetric: bool = False,
) -> tuple[Array, Array, Array, list[float]]:
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    W = checks.matrix(W, "W")
    if start is not None:
        start = _checked(W, *start)[1:]
        if symmetric and start[1].any():
            raise ValueError("a symmetric fit must start from mu = 0")
    grids, _, T, errors, steps = fit_rows(W, max_iterations, start, symmetric, symmetric)
    return grids[:, 2:3], grids[:, 3:4], T, errors.sum(axis=1)[: int(steps.max())].tolist()


def residual(W: Array, alpha: Array, mu: Array, T: Array) -> Array:
    """Compute the error W - (alpha T + mu), (n, m) float64."""
    return W - (alpha * T + mu)


def squared_norm(A: Array) -> Array:
    """Compute the squared Frobenius norm, as a float64 device scalar."""
    return xp.square(A, dtype=np.float64).sum()


def _checked(W: Array, alpha: Array, mu: Array, T: Array) -> tuple[Array, Array, Array, Array]:
    W = checks.matrix(W, "W")
    rows = W.shape[0]
    return W, checks.column(alpha, rows, "alpha"), checks.column(mu, rows, "mu"), checks.trits(T, W.shape)
