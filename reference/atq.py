"""Asymmetric ternary quantizer, Section 3.2 (Eq. 4-10) and the ITF loop of Algorithm 1."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from reference import checks
from reference.checks import Floats, Trits
from reference.twn import symmetric_ternarize


def ternary_init(W: ArrayLike) -> tuple[Floats, Floats, Trits]:
    """Start from the row means: ``W_hat = alpha * T + mu`` (Eq. 4-5).

    Parameters
    ----------
    W : (n, m) array_like
        Weights.

    Returns
    -------
    alpha, mu : (n, 1) float64
        Scale and shift; mu is the mean of the row (Eq. 4).
    T : (n, m) int8
        Trits of the centred weights W - mu, by the threshold of Eq. 5 in Eq. 2.

    Raises
    ------
    ValueError
        If W is not a non-empty, finite matrix.
    """
    W = checks.matrix(W, "W")
    mu = W.mean(axis=1, keepdims=True)
    alpha, T = symmetric_ternarize(W - mu)
    return alpha, mu, T


def weight_error(W: ArrayLike, alpha: ArrayLike, mu: ArrayLike, T: ArrayLike) -> float:
    r"""Quantization error of the weights, :math:`E_w = \|W - (\alpha T + \mu)\|_F^2` (Eq. 6).

    Parameters
    ----------
    W : (n, m) array_like
        Weights.
    alpha, mu : (n, 1) array_like
        Grid.
    T : (n, m) array_like
        Trits.

    Returns
    -------
    float
        The squared Frobenius norm.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, or T holds something that is not a trit.
    """
    return float(_row_errors(*_checked(W, alpha, mu, T)).sum())


def weight_error_gradient(
    W: ArrayLike, alpha: ArrayLike, mu: ArrayLike, T: ArrayLike
) -> tuple[Floats, Floats]:
    r"""Gradient of `weight_error` with respect to alpha and mu (Eq. 7).

    Parameters
    ----------
    W, alpha, mu, T
        As for `weight_error`.

    Returns
    -------
    d_alpha, d_mu : (n, 1) float64
        :math:`2(\alpha_i t_i + \mu_i 1^T - w_i) t_i^T` and
        :math:`2(\alpha_i t_i + \mu_i 1^T - w_i) 1` for every row i.

    Raises
    ------
    ValueError
        As for `weight_error`.
    """
    W, alpha, mu, T = _checked(W, alpha, mu, T)
    residual = alpha * T + mu - W
    return 2 * (residual * T).sum(axis=1, keepdims=True), 2 * residual.sum(axis=1, keepdims=True)


def build_optimal_grid(W: ArrayLike, T: ArrayLike, symmetric: bool = False) -> tuple[Floats, Floats]:
    r"""The grid that minimizes E_w for fixed trits: the solution of Eq. 8 in closed form (Eq. 9).

    Parameters
    ----------
    W : (n, m) array_like
        Weights.
    T : (n, m) array_like
        Trits.
    symmetric : bool
        Whether mu is 0.

    Returns
    -------
    alpha, mu : (n, 1) float64
        A row whose trits are all equal determines no scale: alpha is 0 and mu the mean. If mu is 0, that is
        so only where all trits are 0.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, or T holds something that is not a trit.

    Notes
    -----
    Eq. 9, all operations per row:

    .. math::
        \alpha = \frac{m (W \circ T)1 - (T1) \circ (W1)}{m (T \circ T)1 - (T1)^2}, \quad
        \mu = \frac{(T \circ T)1 \circ (W1) - (T1) \circ ((W \circ T)1)}{m (T \circ T)1 - (T1)^2}

    Neither changes when the same constant is added to W and taken from mu. W is centred first, as
    the printed differences lose all their digits where the mean is large beside the spread.

    With mu = 0 the minimum of Eq. 8 is the scale of Eq. 1-3 for these trits,
    :math:`\alpha = (W \circ T)1 / (T \circ T)1`.
    """
    W = checks.matrix(W, "W")
    T = checks.trits(T, W.shape)
    m = W.shape[1]
    TT1 = np.abs(T).sum(axis=1, keepdims=True, dtype=np.int64)
    if symmetric:
        alpha = (W * T).sum(axis=1, keepdims=True) / np.maximum(TT1, 1)
        return alpha, np.zeros_like(alpha)
    mean = W.mean(axis=1, keepdims=True)
    T1 = T.sum(axis=1, keepdims=True, dtype=np.int64)
    denominator = m * TT1 - T1**2  # integers: 0 exactly where the trits of the row are all equal
    WT1 = ((W - mean) * T).sum(axis=1, keepdims=True)
    alpha = np.where(denominator == 0, 0.0, m * WT1 / np.maximum(denominator, 1))
    return alpha, mean - alpha * T1 / m


def flexible_round(W: ArrayLike, alpha: ArrayLike, mu: ArrayLike) -> Trits:
    r"""The trits that minimize E_w for a fixed grid (Eq. 10).

    Parameters
    ----------
    W : (n, m) array_like
        Weights.
    alpha, mu : (n, 1) array_like
        Grid; alpha may be negative.

    Returns
    -------
    T : (n, m) int8
        The trit nearest to :math:`Z_{ij} = (W_{ij} - \mu_i) / \alpha_i`. A tie, |Z| = ½, goes to 0,
        and so does a row with alpha = 0, where every trit gives the same error.

    Raises
    ------
    ValueError
        If shapes do not fit or a value is not finite.
    """
    W = checks.matrix(W, "W")
    alpha = checks.column(alpha, W.shape[0], "alpha")
    mu = checks.column(mu, W.shape[0], "mu")
    # |Z| > ½ without the division, which would overflow for a tiny alpha.
    centred = W - mu
    beyond = np.abs(centred) > np.abs(alpha) / 2
    sign = np.sign(centred) * np.sign(alpha)
    return np.where(beyond, sign, 0).astype(np.int8)


def iterative_ternary_fitting(
    W: ArrayLike,
    max_iterations: int = 100,
    start: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    symmetric: bool = False,
) -> tuple[Floats, Floats, Trits, list[float]]:
    """Alternate Eq. 9 and Eq. 10 until the trits stop changing (ITF, Algorithm 1).

    Parameters
    ----------
    W : (n, m) array_like
        Weights.
    max_iterations : int
        Most rounds of grid and rounding.
    start : (alpha, mu, T), optional
        Where to begin; if left out `ternary_init(W)`, or with mu = 0 `reference.twn.symmetric_ternarize(W)`.
    symmetric : bool
        Whether mu is 0.

    Returns
    -------
    alpha, mu : (n, 1) float64
        The optimal grid of the returned trits, also where the limit was hit.
    T : (n, m) int8
        Trits; a fixed point of Eq. 10 unless the limit was hit.
    errors : list of float
        E_w at the start and after every half-step (grid, rounding, grid, ...). It never rises by more
        than rounding.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, max_iterations is not positive, or `symmetric` is asked
        for and a mu of `start` is not 0.

    Notes
    -----
    Both half-steps are exact minimizations over one of two arguments, so E_w cannot rise, and where it
    stays the same, ties have turned trits to 0; there are finitely many T, so the loop ends. The paper
    sees about 10 rounds. Rows do not depend on each other: one whose trits did not change is at its fixed
    point and is not visited again.
    """
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    if start is None and symmetric:
        scale, trits = symmetric_ternarize(W)
        start = scale, np.zeros_like(scale), trits
    W, alpha, mu, T = _checked(W, *(start or ternary_init(W)))
    if symmetric and mu.any():
        raise ValueError("a symmetric fit must start from mu = 0")
    alpha, mu, T = alpha.copy(), mu.copy(), T.copy()

    row_errors = _row_errors(W, alpha, mu, T)
    errors = [float(row_errors.sum())]

    def refit(rows: np.ndarray) -> None:
        alpha[rows], mu[rows] = build_optimal_grid(W[rows], T[rows], symmetric)
        record(rows)

    def record(rows: np.ndarray) -> None:
        row_errors[rows] = _row_errors(W[rows], alpha[rows], mu[rows], T[rows])
        errors.append(float(row_errors.sum()))

    rows = np.arange(W.shape[0])
    for _ in range(max_iterations):
        refit(rows)
        rounded = flexible_round(W[rows], alpha[rows], mu[rows])
        changed = (rounded != T[rows]).any(axis=1)
        rows = rows[changed]
        T[rows] = rounded[changed]
        record(rows)
        if rows.size == 0:
            break
    else:
        refit(rows)
    return alpha, mu, T, errors


def _checked(
    W: ArrayLike, alpha: ArrayLike, mu: ArrayLike, T: ArrayLike
) -> tuple[Floats, Floats, Floats, Trits]:
    W = checks.matrix(W, "W")
    rows = W.shape[0]
    return W, checks.column(alpha, rows, "alpha"), checks.column(mu, rows, "mu"), checks.trits(T, W.shape)


def _row_errors(W: Floats, alpha: Floats, mu: Floats, T: Trits) -> Floats:
    return np.square(W - (alpha * T + mu)).sum(axis=1)
