"""Coordinate descent on the trits of whole rows, in float64; see `reference.descent`."""

from __future__ import annotations

from gpu import checks
from gpu.device import Array
from gpu.joint import grid_of, residual
from gpu.kernels.descent import descend_rows
from gpu.twin import twin

# Most passes over the columns.
SWEEPS = 8


@twin
def descend(
    W: Array, T: Array, alpha: Array, mu: Array, H: Array, block_size: int, sweeps: int = SWEEPS
) -> Array:
    if sweeps < 0:
        raise ValueError(f"sweeps must not be negative, got {sweeps}")
    W = checks.matrix(W, "W")
    T = checks.trits(T, W.shape)
    H = checks.gram(H, W.shape[1], "H")
    alpha, mu = grid_of(alpha, W.shape, block_size, "alpha"), grid_of(mu, W.shape, block_size, "mu")
    return descended(W, T, alpha, mu, H, block_size, sweeps)


def descended(
    W: Array, T: Array, alpha: Array, mu: Array, H: Array, block_size: int, sweeps: int = SWEEPS
) -> Array:
    """Compute `descend` without checking the input or waiting for the device."""
    T = T.copy(order="C")
    descend_rows(T, residual(W, T, alpha, mu, block_size) @ H, alpha, H, block_size, sweeps)
    return T
