"""Asymmetric targets: what a matrix should compute after ternary layers; see `reference.targets`.

Targets are float64, whatever the type of the weights: they are means between weights and corrections.
"""

from __future__ import annotations

import numpy as np

from gpu import checks
from gpu.device import Array, xp
from gpu.gptq import check_damping, damped_inverse
from gpu.twin import twin


@twin
def lost_products(Y: Array, W: Array, X_hat: Array, omega: Array | None = None) -> Array:
    W, X_hat, Y = checks.matrix(W, "W"), checks.matrix(X_hat, "X_hat"), checks.matrix(Y, "Y")
    checks.same_shape("X_hat", X_hat, (X_hat.shape[0], W.shape[1]))
    checks.same_shape("Y", Y, (X_hat.shape[0], W.shape[0]))
    X_hat = X_hat.astype(np.float64, copy=False)
    lost = Y - X_hat @ W.T.astype(np.float64, copy=False)
    if omega is not None:
        omega = checks.column(omega, len(X_hat), "omega")
        if (omega < 0).any():
            raise ValueError(f"omega[{int(xp.argmin(omega))}] is negative; weights of tokens are not")
        lost *= omega
    return lost.T @ X_hat


@twin
def token_weights(h: Array) -> Array:
    size = xp.square(checks.matrix(h, "h"), dtype=np.float64).mean(axis=1, keepdims=True)
    return xp.where(size > 0, 1.0, 0.0) / xp.where(size > 0, size, 1.0)


@twin
def shift_targets(W: Array, C: Array, D: Array, damping: float = 0.1, strength: float = 1.0) -> Array:
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, got {strength}")
    W, D = checks.matrix(W, "W"), checks.matrix(D, "D")
    checks.same_shape("D", D, W.shape)
    C = checks.gram(C, W.shape[1])
    check_damping(damping)
    Hinv, _ = damped_inverse(C, damping)
    return W + strength * (xp.where(xp.diagonal(C) == 0, 0.0, D) @ Hinv)
