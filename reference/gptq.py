"""Block error compensation, the GPTQ side of Section 3.3: what a block's error does to the rest."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import linalg

from reference import checks
from reference.checks import Floats
from reference.ssr import Indices

# A factorization that fails is tried again with this much more damping, up to the limit.
DAMPING_STEP = 10.0
DAMPING_LIMIT = 1.0


def gram(X: ArrayLike) -> Floats:
    r"""Gram matrix of calibration inputs, :math:`C = X^T X` (under Eq. 12).

    GPTQ's Hessian is twice this; no result depends on a factor of C.

    Parameters
    ----------
    X : (tokens, m) array_like
        Inputs of the layer, one token a row.

    Returns
    -------
    C : (m, m) float64
        Symmetric, positive semidefinite.

    Raises
    ------
    ValueError
        If X is not a non-empty, finite matrix.
    """
    X = checks.matrix(X, "X")
    return X.T @ X


def damp(C: ArrayLike, damping: float) -> Floats:
    """Damped Gram matrix, ``H = C + damping * mean(diag C) * I`` (GPTQ, which Section 3.3 follows).

    Parameters
    ----------
    C : (m, m) array_like
        Gram matrix.
    damping : float
        Share of the mean of the diagonal, not negative; GPTQ takes 0.01, and the paper names none.

    Returns
    -------
    H : (m, m) float64

    Raises
    ------
    ValueError
        If damping is negative or not finite, or C is not symmetric or has a negative diagonal.
    """
    if not 0 <= damping < np.inf:
        raise ValueError(f"damping must be a finite number that is not negative, got {damping}")
    C = checks.gram(C, np.shape(C)[-1])
    return C + damping * np.diag(C).mean() * np.eye(C.shape[0])


def invert_damped(C: ArrayLike, damping: float) -> tuple[Floats, float]:
    """The inverse of the damped Gram matrix, raising the damping where it has none.

    Parameters
    ----------
    C : (m, m) array_like
        Gram matrix.
    damping : float
        First damping to try. 0 asks for no damping at all and is never raised.

    Returns
    -------
    Hinv : (m, m) float64
        Inverse of H. Dead inputs (zero diagonal of C) are uncoupled from all others; their
        diagonal is 1, on which no result depends unless C is some 1e15 times larger or smaller.
    damping : float
        What was used: the first of damping, 10 damping, 100 damping, ..., up to 1, for which H has
        a Cholesky factor.

    Raises
    ------
    ValueError
        If damping is negative or not finite, or C is not symmetric or has a negative diagonal.
    numpy.linalg.LinAlgError
        If no step has a factor; the message lists what was tried.
    """
    C = checks.gram(C, np.shape(C)[-1])
    dead = np.diag(C) == 0
    tried = []
    while True:
        H = damp(C, damping)
        H[dead, dead] = 1.0
        # A factor exists to rounding for some singular matrices; its condition number tells.
        factor, failed = linalg.lapack.dpotrf(H, lower=1, clean=1)
        if not failed:
            reciprocal_condition, _ = linalg.lapack.dpocon(factor, np.abs(H).sum(axis=0).max(), uplo="L")
            if reciprocal_condition > np.finfo(np.float64).eps:
                return linalg.cho_solve((factor, True), np.eye(H.shape[0])), damping
        tried.append(damping)
        raised = damping * DAMPING_STEP
        if not 0 < raised <= DAMPING_LIMIT:
            raise np.linalg.LinAlgError(
                f"the Gram matrix ({H.shape[0]} inputs, {dead.sum()} dead) is not positive definite "
                f"with damping {', '.join(f'{d:g}' for d in tried)}; use more calibration tokens or damping"
            )
        damping = raised


def compensate(W_R: ArrayLike, E: ArrayLike, Hinv_BB: ArrayLike, Hinv_BR: ArrayLike) -> Floats:
    r"""Move the error of a quantized block into the columns still to come: the exact block step.

    Parameters
    ----------
    W_R : (n, r) array_like
        Remaining columns.
    E : (n, k) array_like
        Error of the block, :math:`W_B - \hat W_B`.
    Hinv_BB, Hinv_BR : (k, k), (k, r) array_like
        Blocks of the inverse of H, taken over the block and the remaining columns.

    Returns
    -------
    (n, r) float64
        :math:`W_R - E (H^{-1}_{BB})^{-1} H^{-1}_{BR}`.

    Raises
    ------
    ValueError
        If shapes do not fit or a value is not finite.
    numpy.linalg.LinAlgError
        If Hinv_BB is not positive definite.

    Notes
    -----
    This minimizes :math:`\mathrm{tr}((W - \hat W) H (W - \hat W)^T)` over the remaining columns of
    :math:`\hat W` with those of the block fixed (optimal brain surgeon). Dividing by the diagonal
    of a Cholesky factor, as GPTQ does, is the same only where columns are quantized one at a time.
    """
    W_R, E, Hinv_BR = checks.matrix(W_R, "W_R"), checks.matrix(E, "E"), checks.matrix(Hinv_BR, "Hinv_BR")
    Hinv_BB = checks.gram(Hinv_BB, E.shape[1], "Hinv_BB")
    checks.same_shape("W_R", W_R, (E.shape[0], Hinv_BR.shape[1]))
    checks.same_shape("Hinv_BR", Hinv_BR, (E.shape[1], W_R.shape[1]))
    return W_R - E @ linalg.cho_solve(linalg.cho_factor(Hinv_BB), Hinv_BR)


def eliminate(Hinv: ArrayLike, B: Indices, R: Indices) -> Floats:
    r"""Inverse of H over the remaining columns alone, from that over block and remaining columns.

    Parameters
    ----------
    Hinv : (r + k, r + k) array_like
        Inverse of H over both.
    B, R : (k,), (r,) intp
        Positions of the block and of the remaining columns.

    Returns
    -------
    (r, r) float64
        The Schur complement
        :math:`H^{-1}_{RR} - H^{-1}_{RB} (H^{-1}_{BB})^{-1} H^{-1}_{BR} = (H_{RR})^{-1}`.

    Raises
    ------
    ValueError
        If Hinv is not a symmetric, finite matrix.
    numpy.linalg.LinAlgError
        If its block is not positive definite.
    """
    Hinv = checks.gram(Hinv, np.shape(Hinv)[-1], "Hinv")
    factor = linalg.cholesky(Hinv[np.ix_(B, B)], lower=True)
    half = linalg.solve_triangular(factor, Hinv[np.ix_(B, R)], lower=True)
    # Subtracting a product of a matrix with its own transpose keeps the result symmetric.
    return Hinv[np.ix_(R, R)] - half.T @ half
