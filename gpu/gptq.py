"""Block error compensation, the GPTQ side of Section 3.3, in float64; see `reference.gptq`."""

from __future__ import annotations

import numpy as np

from gpu import checks
from gpu.device import Array, cholesky, is_factor, solve_lower, xp
from gpu.twin import twin
from reference.gptq import DAMPING_LIMIT, DAMPING_STEP

# Columns in one panel of a triangular inverse. Products skip the zeros above a panel: eight panels need a
# third of the full product's operations.
PANEL = 512


@twin
def gram(X: Array) -> Array:
    X = checks.matrix(X, "X").astype(np.float64, copy=False)
    return X.T @ X


@twin
def damp(C: Array, damping: float) -> Array:
    check_damping(damping)
    return _damped(checks.gram(C, C.shape[-1]), damping)


@twin
def invert_damped(C: Array, damping: float) -> tuple[Array, float]:
    """At most three (m, m) float64 matrices are in memory, C included. The host waits for the device once per
    damping step.
    """
    check_damping(damping)
    return damped_inverse(checks.gram(C, C.shape[-1]), damping)


def damped_inverse(C: Array, damping: float) -> tuple[Array, float]:
    """Compute `invert_damped` without checking the input."""
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


@twin
def compensate(W_R: Array, E: Array, Hinv_BB: Array, Hinv_BR: Array) -> Array:
    """The result has the type of W_R, float32 or float64."""
    W_R, E, Hinv_BR = checks.matrix(W_R, "W_R"), checks.matrix(E, "E"), checks.matrix(Hinv_BR, "Hinv_BR")
    Hinv_BB = checks.gram(Hinv_BB, E.shape[1], "Hinv_BB")
    checks.same_shape("W_R", W_R, (E.shape[0], Hinv_BR.shape[1]))
    checks.same_shape("Hinv_BR", Hinv_BR, (E.shape[1], W_R.shape[1]))
    whitening, half = halved(factored(Hinv_BB, "Hinv_BB"), Hinv_BR)
    return W_R - (E @ whitening.T @ half).astype(W_R.dtype, copy=False)


@twin
def eliminate(Hinv: Array, B: Array, R: Array) -> Array:
    Hinv = checks.gram(Hinv, Hinv.shape[-1], "Hinv")
    B, R = xp.asarray(B), xp.asarray(R)
    _, half = halved(factored(Hinv[B[:, None], B], "the block of Hinv"), Hinv[B[:, None], R])
    return Hinv[R[:, None], R] - half.T @ half


def halved(L: Array, Hinv_BR: Array) -> tuple[Array, Array]:
    """Compute L⁻¹ and half = L⁻¹ H⁻¹_BR, where L is the Cholesky factor of H⁻¹_BB.

    Elimination subtracts H⁻¹_RB (H⁻¹_BB)⁻¹ H⁻¹_BR = ``half.T @ half``, and compensation subtracts
    E (H⁻¹_BB)⁻¹ H⁻¹_BR = ``E @ inv(L).T @ half``. Both share one factor and one product.
    """
    whitening = solve_lower(L, xp.eye(L.shape[0], order="F"))
    return whitening, whitening @ Hinv_BR


def inverse_by_factor(L: Array) -> Array:
    """Overwrite a Cholesky factor L with the inverse of L Lᵀ, as LAPACK's potri does."""
    m = L.shape[0]
    for first in reversed(range(0, m, PANEL)):
        panel, below = slice(first, first + PANEL), slice(first + PANEL, m)
        own = solve_lower(L[panel, panel].copy(), xp.eye(min(PANEL, m - first), order="F"))
        if first + PANEL < m:  # the trailing matrix is inverted already
            L[below, panel] = L[below, below] @ (L[below, panel] @ -own)
        L[panel, panel] = own
    for first in range(0, m, PANEL):  # L⁻ᵀ L⁻¹: rows of L⁻¹ above the panel are zero, and never read again
        panel, last = slice(first, first + PANEL), first + PANEL
        product = L[first:, panel].T @ L[first:, :last]
        L[panel, :last] = product
        L[:first, panel] = product[:, :first].T
    return L


def check_damping(damping: float) -> None:
    """Refuse what is no share of a diagonal."""
    if not 0 <= damping < np.inf:
        raise ValueError(f"damping must be a finite number that is not negative, got {damping}")


def _damped(C: Array, damping: float) -> Array:
    H = C.copy()
    diagonal = xp.diagonal(C)
    H[xp.arange(C.shape[0]), xp.arange(C.shape[0])] = diagonal + damping * diagonal.mean()
    return H


def _inverse(C: Array, damping: float, dead: Array) -> tuple[Array, bool]:
    """Invert the damped matrix, and say whether it was regular to rounding."""
    H = _damped(C, damping)
    every = xp.arange(C.shape[0])
    H[every, every] = xp.where(dead, 1.0, xp.diagonal(H))
    norm = xp.linalg.norm(H, 1)
    diagonal = xp.diagonal(H).copy()
    L = cholesky(H)
    del H
    regular = is_factor(L, diagonal)
    Hinv = inverse_by_factor(L)
    # Rounding gives some singular matrices a factor; the condition number tells them apart.
    regular &= norm * xp.linalg.norm(Hinv, 1) * np.finfo(np.float64).eps < 1
    return Hinv, bool(regular)


def factored(A: Array, name: str) -> Array:
    """Return the lower Cholesky factor, or raise LinAlgError; waits for the device."""
    L = cholesky(A)
    if not is_factor(L, xp.diagonal(A)):
        raise np.linalg.LinAlgError(f"{name} is not positive definite")
    return L
