r"""Asymmetric targets: what a matrix should compute once the layers before it are ternary.

Its inputs are then :math:`\hat X`, no longer the X of the original model, and the weights that bring
:math:`\hat X` closest to the original outputs are not W.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from reference import checks
from reference.checks import Floats
from reference.gptq import invert_damped


def lost_products(Y: ArrayLike, W: ArrayLike, X_hat: ArrayLike, omega: ArrayLike | None = None) -> Floats:
    r"""Products of what the outputs lack with the inputs, :math:`D = (Y - \hat X W^T)^T \Omega \hat X`.

    Parameters
    ----------
    Y : (tokens, n) array_like
        Outputs that are wanted: those of the original model, :math:`X W^T`, or, for a matrix that adds to
        the residual stream, the original stream after it less the ternary stream before it.
    W : (n, m) array_like
        Weights.
    X_hat : (tokens, m) array_like
        Inputs computed by the matrices that are ternary so far.
    omega : (tokens, 1) array_like, optional
        Weights of the tokens (`token_weights`), which the Gram matrix must share; 1 if left out.

    Returns
    -------
    D : (n, m) float64

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, or a token's weight is negative.
    """
    W, X_hat, Y = checks.matrix(W, "W"), checks.matrix(X_hat, "X_hat"), checks.matrix(Y, "Y")
    checks.same_shape("X_hat", X_hat, (X_hat.shape[0], W.shape[1]))
    checks.same_shape("Y", Y, (X_hat.shape[0], W.shape[0]))
    lost = Y - X_hat @ W.T
    if omega is not None:
        omega = checks.column(omega, len(X_hat), "omega")
        if (omega < 0).any():
            raise ValueError(f"omega[{int(np.argmin(omega))}] is negative; weights of tokens are not")
        lost = omega * lost
    return lost.T @ X_hat


def token_weights(h: ArrayLike) -> Floats:
    r"""Weights of the tokens in a residual target, :math:`\omega_t = 1 / \mathrm{mean}(h_t^2)`.

    Parameters
    ----------
    h : (tokens, width) array_like
        Residual stream of the original model.

    Returns
    -------
    (tokens, 1) float64
        A token whose stream is 0 has the weight 0.

    Raises
    ------
    ValueError
        If h is not a non-empty, finite matrix.

    Notes
    -----
    What reads the stream normalizes it first, so errors count relative to its size. Without weights the first
    token would rule: its stream is 30 to 1000 times the median.
    """
    size = np.square(checks.matrix(h, "h")).mean(axis=1, keepdims=True)
    return np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)


def shift_targets(
    W: ArrayLike, C: ArrayLike, D: ArrayLike, damping: float = 0.1, strength: float = 1.0
) -> Floats:
    r"""The weights to ternarize in place of W, :math:`W^* = W + s D H^{-1}`.

    Parameters
    ----------
    W : (n, m) array_like
        Weights.
    C : (m, m) array_like
        Gram matrix of the inputs, :math:`\hat X^T \Omega \hat X`.
    D : (n, m) array_like
        `lost_products`.
    damping : float
        As for `reference.gptq.invert_damped`.
    strength : float
        How far to follow the calibration text (s), from 0 (W itself) to 1.

    Returns
    -------
    W_star : (n, m) float64

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, C is not a Gram matrix, or strength is outside [0, 1].
    numpy.linalg.LinAlgError
        If the damped Gram matrix has no inverse.

    Notes
    -----
    For s = 1 this minimizes :math:`\|\Omega^{1/2}(Y - \hat X W^{*T})\|_F^2 + \lambda \|W^* - W\|_F^2` with
    :math:`H = C + \lambda I`: ridge regression of the wanted outputs, pulled towards W. Every quantizer that
    minimizes :math:`\mathrm{tr}((W^* - \hat W) H (W^* - \hat W)^T)` then minimizes the error of the outputs
    that are wanted. A dead input (zero diagonal of C) keeps its weights.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, got {strength}")
    W, D = checks.matrix(W, "W"), checks.matrix(D, "D")
    checks.same_shape("D", D, W.shape)
    C = checks.gram(C, W.shape[1])
    Hinv, _ = invert_damped(C, damping)
    return W + strength * np.where(np.diag(C) == 0, 0.0, D) @ Hinv
