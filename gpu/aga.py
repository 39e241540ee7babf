"""Activation-aware grid alignment, Section 3.2 (Eq. 11-12), in float64; see `reference.aga`.

Eq. 13 as printed is left out: it is in the reference so that the misprint can be shown.
"""

from __future__ import annotations

import numpy as np

from gpu import checks
from gpu.atq import residual
from gpu.device import Array, xp
from gpu.kernels.alignment import align_rows

# Columns of C that a quadratic form takes at a time: with eight panels it takes 9/16 of the products.
PANEL = 1024


def output_error(W: Array, W_hat: Array, C: Array) -> float:
    r"""Error of the layer's outputs, :math:`\mathrm{tr}((W - \hat W) C (W - \hat W)^T)` (Eq. 11).

    Parameters
    ----------
    W, W_hat : (n, m) float32 or float64
        Weights, and the weights that replace them.
    C : (m, m) array
        Gram matrix of the inputs.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, C is not symmetric or has a negative diagonal.
    """
    W = checks.matrix(W, "W")
    W_hat = checks.matrix(W_hat, "W_hat")
    checks.same_shape("W_hat", W_hat, W.shape)
    C = checks.gram(C, W.shape[1])
    return float(quadratic_form(W.astype(np.float64) - W_hat, C))


def quadratic_form(E: Array, C: Array) -> Array:
    """tr(E C Eᵀ) for a symmetric C, as a device scalar."""
    total = xp.zeros(())
    for first in range(0, C.shape[0], PANEL):
        panel = slice(first, first + PANEL)
        own = E[:, panel]
        product = own @ C[panel, panel]
        if first:  # what is left of a panel of C and what is above it count alike
            product += 2 * (E[:, :first] @ C[:first, panel])
        total += (product * own).sum(axis=1).sum()
    return total


def output_error_gradient(W: Array, alpha: Array, mu: Array, T: Array, C: Array) -> tuple[Array, Array]:
    """Gradient of E_x with respect to alpha and mu; setting it to zero gives Eq. 12.

    Parameters
    ----------
    W : (n, m) float32 or float64
        Weights.
    alpha, mu : (n, 1) array
        Grid.
    T : (n, m) array
        Trits.
    C : (m, m) array
        Gram matrix of the inputs.

    Returns
    -------
    d_alpha, d_mu : (n, 1) float64

    Raises
    ------
    ValueError
        As for `output_error`, or if T holds something that is not a trit.
    """
    W = checks.matrix(W, "W")
    T = checks.trits(T, W.shape)
    C = checks.gram(C, W.shape[1])
    alpha = checks.column(alpha, W.shape[0], "alpha")
    EC = residual(W, alpha, checks.column(mu, W.shape[0], "mu"), T) @ C
    return -2 * (EC * T).sum(axis=1, keepdims=True), -2 * EC.sum(axis=1, keepdims=True)


def align_grid(W: Array, T: Array, C: Array) -> tuple[Array, Array]:
    """The grid that minimizes E_x for fixed trits: the exact solution of Eq. 12 (AGA).

    Parameters
    ----------
    W : (n, m) float32 or float64
        Weights.
    T : (n, m) array
        Trits.
    C : (m, m) array
        Gram matrix of the inputs.

    Returns
    -------
    alpha, mu : (n, 1) float64
        Not rounded to what a checkpoint stores.

    Raises
    ------
    ValueError
        As for `output_error`, or if T holds something that is not a trit.
    """
    W = checks.matrix(W, "W")
    return aligned_grid(W, checks.trits(T, W.shape), checks.gram(C, W.shape[1]))


def aligned_grid(W: Array, T: Array, C: Array) -> tuple[Array, Array]:
    """`align_grid` of input that has been checked."""
    return align_rows(W, T, T.astype(np.float64) @ C, C.sum(axis=1))
