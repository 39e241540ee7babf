"""Activation-aware grid alignment, Section 3.2 (Eq. 11-12), in float64; see `reference.aga`.

Eq. 13 as printed is left out: the reference has it to show the misprint.
"""

from __future__ import annotations

import numpy as np

from gpu import checks
from gpu.atq import residual
from gpu.device import Array, xp
from gpu.kernels.alignment import align_rows
from gpu.twin import twin

# Columns of C in one panel of a quadratic form. Eight panels need 9/16 of the full product's operations.
PANEL = 1024


@twin
def output_error(W: Array, W_hat: Array, C: Array) -> float:
    W = checks.matrix(W, "W")
    W_hat = checks.matrix(W_hat, "W_hat")
    checks.same_shape("W_hat", W_hat, W.shape)
    C = checks.gram(C, W.shape[1])
    return float(quadratic_form(W.astype(np.float64) - W_hat, C))


def quadratic_form(E: Array, C: Array) -> Array:
    """Compute tr(E C Eᵀ) for a symmetric C, as a device scalar."""
    total = xp.zeros(())
    for first in range(0, C.shape[0], PANEL):
        panel = slice(first, first + PANEL)
        own = E[:, panel]
        product = own @ C[panel, panel]
        if first:  # C is symmetric: the part above its diagonal panel equals the part to the left
            product += 2 * (E[:, :first] @ C[:first, panel])
        total += (product * own).sum(axis=1).sum()
    return total


@twin
def output_error_gradient(W: Array, alpha: Array, mu: Array, T: Array, C: Array) -> tuple[Array, Array]:
    W = checks.matrix(W, "W")
    T = checks.trits(T, W.shape)
    C = checks.gram(C, W.shape[1])
    alpha = checks.column(alpha, W.shape[0], "alpha")
    EC = residual(W, alpha, checks.column(mu, W.shape[0], "mu"), T) @ C
    return -2 * (EC * T).sum(axis=1, keepdims=True), -2 * EC.sum(axis=1, keepdims=True)


@twin
def align_grid(W: Array, T: Array, C: Array, symmetric: bool = False) -> tuple[Array, Array]:
    W = checks.matrix(W, "W")
    return aligned_grid(W, checks.trits(T, W.shape), checks.gram(C, W.shape[1]), symmetric)


def aligned_grid(W: Array, T: Array, C: Array, symmetric: bool) -> tuple[Array, Array]:
    """Compute `align_grid` without checking the input."""
    return align_rows(W, T, T.astype(np.float64) @ C, C.sum(axis=1), symmetric)
