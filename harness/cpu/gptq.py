"""Factors and the inverse of the damped Gram matrix, without a product more than LAPACK needs."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import lapack

from reference import checks
from reference.checks import Floats
from reference.gptq import DAMPING_LIMIT, DAMPING_STEP, damp

__all__ = ["damp", "factor_damped", "inverse", "invert_damped"]


def invert_damped(C: Any, damping: float) -> tuple[Floats, float]:
    factor, damping = factor_damped(checks.gram(C, np.shape(C)[-1]), damping)
    return inverse(factor), damping


def factor_damped(C: Floats, damping: float) -> tuple[Floats, float]:
    """Factor the damped Gram matrix, raising the damping as `reference.gptq.invert_damped` does.

    Parameters
    ----------
    C : (m, m) float64 array
        Gram matrix.
    damping : float
        First damping to try.

    Returns
    -------
    L : (m, m) float64 array
        Lower Cholesky factor of H, in Fortran order; dead inputs have 1 on the diagonal of H.
    damping : float
        What was used.
    """
    if not 0 <= damping < np.inf:
        raise ValueError(f"damping must be a finite number that is not negative, got {damping}")
    diagonal = np.diag(C)
    dead = diagonal == 0
    tried = []
    while True:
        H = C.copy(order="F")
        np.fill_diagonal(H, np.where(dead, 1.0, diagonal + damping * diagonal.mean()))
        norm = lapack.dlange("1", H)
        factor, failed = lapack.dpotrf(H, lower=1, clean=1, overwrite_a=1)
        if not failed:
            reciprocal_condition, _ = lapack.dpocon(factor, norm, uplo="L")
            if reciprocal_condition > np.finfo(np.float64).eps:
                return factor, damping
        tried.append(damping)
        raised = damping * DAMPING_STEP
        if not 0 < raised <= DAMPING_LIMIT:
            raise np.linalg.LinAlgError(
                f"the Gram matrix ({len(C)} inputs, {dead.sum()} dead) is not positive definite "
                f"with damping {', '.join(f'{d:g}' for d in tried)}; use more calibration tokens or damping"
            )
        damping = raised


def inverse(L: Floats) -> Floats:
    """The symmetric inverse of LLᵀ."""
    lower, _ = lapack.dpotri(L, lower=1)
    symmetric = lower + lower.T  # above the diagonal of `lower` are the zeros of L
    np.fill_diagonal(symmetric, np.diag(lower))
    return symmetric
