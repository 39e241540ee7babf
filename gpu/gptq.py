"""Block error compensation, the GPTQ side of Section 3.3, in float64; see `reference.gptq`."""

from __future__ import annotations

import numpy as np

from gpu import checks
from gpu.device import Array, cholesky, is_factor, solve_lower, xp
from reference.gptq import DAMPING_LIMIT, DAMPING_STEP

# Columns of a triangular matrix that are inverted at a time. Above them are zeros, which need no product:
# eight panels take a third of the products of the whole.
PANEL = 512


def gram(X: Array) -> Array:
    """Gram matrix of calibration inputs, ``C = X.T @ X`` (under Eq. 12).

    Parameters
    ----------
    X : (tokens, m) array
        Inputs of the layer, one token a row.

    Returns
    -------
    C : (m, m) float64

    Raises
    ------
    ValueError
        If X is not a non-empty, finite matrix.
    """
    X = checks.matrix(X, "X").astype(np.float64, copy=False)
    return X.T @ X


def damp(C: Array, damping: float) -> Array:
    """Damped Gram matrix, ``H = C + damping * mean(diag C) * I`` (GPTQ, Section 3.3).

    Parameters
    ----------
    C : (m, m) array
        Gram matrix.
    damping : float
        Share of the mean of the diagonal, not negative.

    Returns
    -------
    H : (m, m) float64

    Raises
    ------
    ValueError
        If damping is negative or not finite, or C is not a Gram matrix.
    """
    _check_damping(damping)
    return _damped(checks.gram(C, C.shape[-1]), damping)


def invert_damped(C: Array, damping: float) -> tuple[Array, float]:
    """The inverse of the damped Gram matrix, raising the damping where it has none.

    Parameters
    ----------
    C : (m, m) array
        Gram matrix.
    damping : float
        First damping to try. 0 asks for no damping at all and is never raised.

    Returns
    -------
    Hinv : (m, m) float64
        Inverse of H. Dead inputs (zero diagonal of C) are uncoupled; their diagonal is 1.
    damping : float
        The first of damping, 10 damping, 100 damping, ..., up to 1, for which H has a Cholesky
        factor and is not singular to rounding.

    Raises
    ------
    ValueError
        If damping is negative or not finite, or C is not a Gram matrix.
    numpy.linalg.LinAlgError
        If no step has a factor; the message lists what was tried.

    Notes
    -----
    Three (m, m) float64 matrices are alive at most, C among them. The device is asked once a step.
    """
    _check_damping(damping)
    return damped_inverse(checks.gram(C, C.shape[-1]), damping)


def damped_inverse(C: Array, damping: float) -> tuple[Array, float]:
    """`invert_damped` of input that has been checked."""
    dead = xp.diagonal(C) == 0
    tried = []
    while True:
        Hinv, regular = _inverse(C, damping, dead)
        if regular:
            return Hinv, damping
        del Hinv
        tried.append(damping)
        raised = damping * DAMPING_STEP
        if not 0 < raised <= DAMPING_LIMIT:
            raise np.linalg.LinAlgError(
                f"the Gram matrix ({C.shape[0]} inputs, {int(dead.sum())} dead) is not positive definite "
                f"with damping {', '.join(f'{d:g}' for d in tried)}; use more calibration tokens or damping"
            )
        damping = raised


def compensate(W_R: Array, E: Array, Hinv_BB: Array, Hinv_BR: Array) -> Array:
    """Move the error of a quantized block into the columns still to come: the exact block step.

    Parameters
    ----------
    W_R : (n, r) float32 or float64
        Remaining columns.
    E : (n, k) array
        Error of the block, W_B - W_hat_B.
    Hinv_BB, Hinv_BR : (k, k), (k, r) array
        Blocks of the inverse of H.

    Returns
    -------
    (n, r) array
        ``W_R - E @ inv(Hinv_BB) @ Hinv_BR``.

    Raises
    ------
    ValueError
        If shapes do not fit or a value is not finite.
    numpy.linalg.LinAlgError
        If Hinv_BB is not positive definite.
    """
    W_R, E, Hinv_BR = checks.matrix(W_R, "W_R"), checks.matrix(E, "E"), checks.matrix(Hinv_BR, "Hinv_BR")
    Hinv_BB = checks.gram(Hinv_BB, E.shape[1], "Hinv_BB")
    checks.same_shape("W_R", W_R, (E.shape[0], Hinv_BR.shape[1]))
    checks.same_shape("Hinv_BR", Hinv_BR, (E.shape[1], W_R.shape[1]))
    whitening, half = halved(_factor(Hinv_BB, "Hinv_BB"), Hinv_BR)
    return W_R - (E @ whitening.T @ half).astype(W_R.dtype, copy=False)


def eliminate(Hinv: Array, B: Array, R: Array) -> Array:
    """Inverse of H over the remaining columns alone, from that over block and remaining columns.

    Parameters
    ----------
    Hinv : (r + k, r + k) array
        Inverse of H over both.
    B, R : (k,), (r,) array of int
        Positions of the block and of the remaining columns.

    Returns
    -------
    (r, r) float64
        The Schur complement.

    Raises
    ------
    ValueError
        If Hinv is not a symmetric, finite matrix.
    numpy.linalg.LinAlgError
        If its block is not positive definite.
    """
    Hinv = checks.gram(Hinv, Hinv.shape[-1], "Hinv")
    B, R = xp.asarray(B), xp.asarray(R)
    _, half = halved(_factor(Hinv[B[:, None], B], "the block of Hinv"), Hinv[B[:, None], R])
    return Hinv[R[:, None], R] - half.T @ half


def halved(L: Array, Hinv_BR: Array) -> tuple[Array, Array]:
    """L⁻¹ and L⁻¹ H⁻¹_BR, with L the Cholesky factor of H⁻¹_BB.

    With `half` for the second, H⁻¹_RB (H⁻¹_BB)⁻¹ H⁻¹_BR is ``half.T @ half``, and the error of a block
    moves by ``E @ inv(L).T @ half``: one factor and one product serve both.
    """
    whitening = solve_lower(L, xp.eye(L.shape[0], order="F"))
    return whitening, whitening @ Hinv_BR


def inverse_by_factor(L: Array) -> Array:
    """The inverse of L Lᵀ in the place of its Cholesky factor, as LAPACK's potri has it."""
    m = L.shape[0]
    for first in reversed(range(0, m, PANEL)):
        panel, below = slice(first, first + PANEL), slice(first + PANEL, m)
        own = solve_lower(L[panel, panel].copy(), xp.eye(min(PANEL, m - first), order="F"))
        if first + PANEL < m:  # the inverse of what is below and to the right stands there already
            L[below, panel] = L[below, below] @ (L[below, panel] @ -own)
        L[panel, panel] = own
    for first in range(0, m, PANEL):  # L⁻ᵀ L⁻¹: rows above the panel are zero in it, and not read again
        panel, last = slice(first, first + PANEL), first + PANEL
        product = L[first:, panel].T @ L[first:, :last]
        L[panel, :last] = product
        L[:first, panel] = product[:, :first].T
    return L


def _check_damping(damping: float) -> None:
    if not 0 <= damping < np.inf:
        raise ValueError(f"damping must be a finite number that is not negative, got {damping}")


def _damped(C: Array, damping: float) -> Array:
    H = C.copy()
    diagonal = xp.diagonal(C)
    H[xp.arange(C.shape[0]), xp.arange(C.shape[0])] = diagonal + damping * diagonal.mean()
    return H


def _inverse(C: Array, damping: float, dead: Array) -> tuple[Array, bool]:
    """Inverse of the damped matrix, and whether it is one to rounding."""
    H = _damped(C, damping)
    every = xp.arange(C.shape[0])
    H[every, every] = xp.where(dead, 1.0, xp.diagonal(H))
    norm = xp.linalg.norm(H, 1)
    diagonal = xp.diagonal(H).copy()
    L = cholesky(H)
    del H
    regular = is_factor(L, diagonal)
    Hinv = inverse_by_factor(L)
    # A factor exists to rounding for some singular matrices; the condition number tells.
    regular &= norm * xp.linalg.norm(Hinv, 1) * np.finfo(np.float64).eps < 1
    return Hinv, bool(regular)


def _factor(A: Array, name: str) -> Array:
    L = cholesky(A)
    if not is_factor(L, xp.diagonal(A)):
        raise np.linalg.LinAlgError(f"{name} is not positive definite")
    return L
