"""Asymmetric ternary quantizer, Section 3.2 (Eq. 4-10) and Algorithm 1; see `reference.atq`."""

from __future__ import annotations

import numpy as np

from gpu import checks
from gpu.device import Array, xp
from gpu.kernels.fitting import fit_rows


def ternary_init(W: Array) -> tuple[Array, Array, Array]:
    """Start from the row means: ``W_hat = alpha * T + mu`` (Eq. 4-5).

    Parameters
    ----------
    W : (n, m) float32 or float64
        Weights.

    Returns
    -------
    alpha, mu : (n, 1) float64
    T : (n, m) int8

    Raises
    ------
    ValueError
        If W is not a non-empty, finite matrix.
    """
    grids, T, _, _, _ = fit_rows(checks.matrix(W, "W"), 0)
    return grids[:, 0:1], grids[:, 1:2], T


def weight_error(W: Array, alpha: Array, mu: Array, T: Array) -> float:
    r"""Quantization error of the weights, :math:`E_w = \|W - (\alpha T + \mu)\|_F^2` (Eq. 6).

    Parameters
    ----------
    W : (n, m) float32 or float64
        Weights.
    alpha, mu : (n, 1) array
        Grid.
    T : (n, m) array
        Trits.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, or T holds something that is not a trit.
    """
    return float(squared_norm(residual(*_checked(W, alpha, mu, T))))


def weight_error_gradient(W: Array, alpha: Array, mu: Array, T: Array) -> tuple[Array, Array]:
    """Gradient of `weight_error` with respect to alpha and mu (Eq. 7).

    Parameters
    ----------
    W, alpha, mu, T
        As for `weight_error`.

    Returns
    -------
    d_alpha, d_mu : (n, 1) float64

    Raises
    ------
    ValueError
        As for `weight_error`.
    """
    W, alpha, mu, T = _checked(W, alpha, mu, T)
    E = residual(W, alpha, mu, T)
    return -2 * (E * T).sum(axis=1, keepdims=True), -2 * E.sum(axis=1, keepdims=True)


def build_optimal_grid(W: Array, T: Array) -> tuple[Array, Array]:
    """The grid that minimizes E_w for fixed trits (Eq. 8-9).

    Parameters
    ----------
    W : (n, m) float32 or float64
        Weights.
    T : (n, m) array
        Trits.

    Returns
    -------
    alpha, mu : (n, 1) float64
        A row whose trits are all equal has alpha 0 and mu the mean.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, or T holds something that is not a trit.
    """
    W = checks.matrix(W, "W")
    T = checks.trits(T, W.shape)
    m = W.shape[1]
    mean = W.mean(axis=1, keepdims=True, dtype=np.float64)
    T1 = T.sum(axis=1, keepdims=True, dtype=np.int64)
    TT1 = abs(T).sum(axis=1, keepdims=True, dtype=np.int64)
    denominator = m * TT1 - T1**2
    WT1 = ((W - mean) * T).sum(axis=1, keepdims=True)
    alpha = xp.where(denominator == 0, 0.0, m * WT1 / xp.maximum(denominator, 1))
    return alpha, mean - alpha * T1 / m


def flexible_round(W: Array, alpha: Array, mu: Array) -> Array:
    """The trits that minimize E_w for a fixed grid (Eq. 10).

    Parameters
    ----------
    W : (n, m) float32 or float64
        Weights.
    alpha, mu : (n, 1) array
        Grid; alpha may be negative.

    Returns
    -------
    T : (n, m) int8
        A tie, |Z| = ½, goes to 0, and so does a row with alpha = 0.

    Raises
    ------
    ValueError
        If shapes do not fit or a value is not finite.
    """
    W = checks.matrix(W, "W")
    alpha = checks.column(alpha, W.shape[0], "alpha")
    centred = W - checks.column(mu, W.shape[0], "mu")
    beyond = abs(centred) > abs(alpha) / 2
    return xp.where(beyond, xp.sign(centred) * xp.sign(alpha), 0.0).astype(np.int8)


def iterative_ternary_fitting(
    W: Array, max_iterations: int = 100, start: tuple[Array, Array, Array] | None = None
) -> tuple[Array, Array, Array, list[float]]:
    """Alternate Eq. 9 and Eq. 10 until the trits stop changing (ITF, Algorithm 1).

    Parameters
    ----------
    W : (n, m) float32 or float64
        Weights.
    max_iterations : int
        Most rounds of grid and rounding.
    start : (alpha, mu, T), optional
        Where to begin; `ternary_init(W)` if left out.

    Returns
    -------
    alpha, mu : (n, 1) float64
        The optimal grid of the returned trits.
    T : (n, m) int8
        Trits; a fixed point of Eq. 10 unless the limit was hit.
    errors : list of float
        E_w at the start and after every half-step.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, or max_iterations is not positive.
    """
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    W = checks.matrix(W, "W")
    if start is not None:
        start = _checked(W, *start)[1:]
    grids, _, T, errors, steps = fit_rows(W, max_iterations, start)
    return grids[:, 2:3], grids[:, 3:4], T, errors.sum(axis=1)[: int(steps.max())].tolist()


def residual(W: Array, alpha: Array, mu: Array, T: Array) -> Array:
    """What a grid and trits leave of W, (n, m) float64."""
    return W - (alpha * T + mu)


def squared_norm(A: Array) -> Array:
    """Squared Frobenius norm as a device scalar, float64."""
    return xp.square(A, dtype=np.float64).sum()


def _checked(W: Array, alpha: Array, mu: Array, T: Array) -> tuple[Array, Array, Array, Array]:
    W = checks.matrix(W, "W")
    rows = W.shape[0]
    return W, checks.column(alpha, rows, "alpha"), checks.column(mu, rows, "mu"), checks.trits(T, W.shape)
