"""Activation-aware grid alignment, Section 3.2 (Eq. 11-13): the grid refitted to the outputs."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from reference import checks
from reference.atq import build_optimal_grid
from reference.checks import Floats

# Eigenvalues of Eq. 12's 2x2 system below this share of the larger one count as zero.
SINGULAR = 1e-12


def output_error(W: ArrayLike, W_hat: ArrayLike, C: ArrayLike) -> float:
    r"""Error of the layer's outputs, :math:`E_x = \|(W - \hat W) X^T\|_F^2` for tokens in rows (Eq. 11).

    Parameters
    ----------
    W, W_hat : (n, m) array_like
        Weights, and the weights that replace them.
    C : (m, m) array_like
        Gram matrix of the inputs.

    Returns
    -------
    float
        :math:`\mathrm{tr}((W - \hat W) C (W - \hat W)^T)`, which is Eq. 11 with the sum over tokens
        taken inside C. In exact arithmetic never negative; rounding may leave a tiny negative value.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, C is not symmetric or has a negative diagonal.
    """
    W = checks.matrix(W, "W")
    W_hat = checks.matrix(W_hat, "W_hat")
    checks.same_shape("W_hat", W_hat, W.shape)
    C = checks.gram(C, W.shape[1])
    E = W - W_hat
    return float(((E @ C) * E).sum())


def output_error_gradient(
    W: ArrayLike, alpha: ArrayLike, mu: ArrayLike, T: ArrayLike, C: ArrayLike
) -> tuple[Floats, Floats]:
    r"""Gradient of E_x with respect to alpha and mu; setting it to zero gives Eq. 12.

    Parameters
    ----------
    W : (n, m) array_like
        Weights.
    alpha, mu : (n, 1) array_like
        Grid.
    T : (n, m) array_like
        Trits.
    C : (m, m) array_like
        Gram matrix of the inputs.

    Returns
    -------
    d_alpha, d_mu : (n, 1) float64
        :math:`2(\alpha_i t_i + \mu_i 1^T - w_i) C t_i^T` and
        :math:`2(\alpha_i t_i + \mu_i 1^T - w_i) C 1` for every row i.

    Raises
    ------
    ValueError
        As for `output_error`, or if T holds something that is not a trit.
    """
    W = checks.matrix(W, "W")
    T = checks.trits(T, W.shape)
    C = checks.gram(C, W.shape[1])
    alpha = checks.column(alpha, W.shape[0], "alpha")
    mu = checks.column(mu, W.shape[0], "mu")
    residual = (alpha * T + mu - W) @ C
    return 2 * (residual * T).sum(axis=1, keepdims=True), 2 * residual.sum(axis=1, keepdims=True)


def align_grid(W: ArrayLike, T: ArrayLike, C: ArrayLike, symmetric: bool = False) -> tuple[Floats, Floats]:
    r"""The grid that minimizes E_x for fixed trits: the exact solution of Eq. 12 (AGA).

    C is taken to be positive semidefinite, as Gram matrices are.

    Parameters
    ----------
    W : (n, m) array_like
        Weights.
    T : (n, m) array_like
        Trits.
    C : (m, m) array_like
        Gram matrix of the inputs.
    symmetric : bool
        Whether mu is 0.

    Returns
    -------
    alpha, mu : (n, 1) float64
        Scale and shift, not rounded to what a checkpoint stores.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, C is not symmetric or has a negative diagonal,
        or T holds something that is not a trit.

    Notes
    -----
    For every row, Eq. 12 is the symmetric system

    .. math::
        \begin{bmatrix} t C t^T & 1^T C t^T \\ t C 1 & 1^T C 1 \end{bmatrix}
        \begin{bmatrix} \alpha \\ \mu \end{bmatrix} =
        \begin{bmatrix} w C t^T \\ w C 1 \end{bmatrix}

    It is solved for the correction of Eq. 9's grid, which keeps digits and settles the rows where
    it is singular (equal trits, rank-deficient C): there the correction of least norm is taken,
    eigenvalues below `SINGULAR` of the larger one being zero.

    With mu = 0 one equation is left, :math:`t C t^T \alpha = w C t^T`. Where :math:`t C t^T = 0` (trits of 0,
    or of inputs that are never seen), alpha stays that of Eq. 9.
    """
    W = checks.matrix(W, "W")
    T = checks.trits(T, W.shape)
    C = checks.gram(C, W.shape[1])
    alpha, mu = build_optimal_grid(W, T, symmetric)

    TC = T @ C
    residual = W - (alpha * T + mu)
    if symmetric:
        weight = (TC * T).sum(axis=1, keepdims=True)
        pull = (TC * residual).sum(axis=1, keepdims=True)
        return alpha + np.divide(pull, weight, out=np.zeros_like(pull), where=weight > 0), mu
    C1 = C.sum(axis=1)
    system = np.empty((W.shape[0], 2, 2))
    system[:, 0, 0] = (TC * T).sum(axis=1)
    system[:, 0, 1] = system[:, 1, 0] = T @ C1
    system[:, 1, 1] = C1.sum()
    right = np.stack([(TC * residual).sum(axis=1), residual @ C1], axis=1)
    correction = np.linalg.pinv(system, rcond=SINGULAR, hermitian=True) @ right[..., None]
    return alpha + correction[:, 0], mu + correction[:, 1]


def align_grid_printed(W: ArrayLike, T: ArrayLike, C: ArrayLike) -> tuple[Floats, Floats]:
    r"""Eq. 13 as the paper prints it, which is not in general the solution of Eq. 12.

    Parameters
    ----------
    W, T, C
        As for `align_grid`.

    Returns
    -------
    alpha, mu : (n, 1) float64
        Scale and shift. Rows whose trits are all equal, or whose denominator is exactly 0, keep
        the grid of Eq. 9.

    Raises
    ------
    ValueError
        As for `align_grid`.

    Notes
    -----
    With S = C, :math:`d = 1^T S 1` and :math:`v = T S 1`, all operations per row,

    .. math::
        \alpha = \frac{d (W \circ T) S 1 - v \circ (W S 1)}{d T^2 S 1 - v^2}, \quad
        \mu = \frac{T^2 S 1 \circ (W S 1) - v \circ ((W \circ T) S 1)}{d T^2 S 1 - v^2}

    Eq. 12 has the quadratic forms w C tᵀ and t C tᵀ, that is ((W S) ∘ T)1 and ((T S) ∘ T)1, where
    this prints (W ∘ T)S1 and T²S1: only the row sums of S are left of it. The result is a least
    squares fit in which column j weighs as much as the j-th row sum of S. For trits that are not all
    equal it agrees with Eq. 12 where S is diagonal, or a diagonal plus a multiple of
    :math:`S 1 (S 1)^T` (equal variances and equal correlations, say); in general it does not. Row sums of a
    real Gram matrix can be negative; then what is "minimized" may have no lower bound, the denominator
    can come arbitrarily close to 0, and the grid with it to infinity. Use `align_grid`; this is here so
    that the difference can be shown.
    """
    W = checks.matrix(W, "W")
    T = checks.trits(T, W.shape)
    S = checks.gram(C, W.shape[1])
    S1 = S.sum(axis=1, keepdims=True)
    d = S1.sum()
    v = T @ S1
    WS1 = W @ S1
    WTS1 = (W * T) @ S1
    T2S1 = np.square(T) @ S1
    denominator = d * T2S1 - v**2
    alpha, mu = build_optimal_grid(W, T)
    # A row of equal trits has the denominator 0, which rounding would hide.
    solvable = (denominator != 0) & (T != T[:, :1]).any(axis=1, keepdims=True)
    np.divide(d * WTS1 - v * WS1, denominator, out=alpha, where=solvable)
    np.divide(T2S1 * WS1 - v * WTS1, denominator, out=mu, where=solvable)
    return alpha, mu
