"""Rounds of joint grid and descent over whole rows, in float64; see `reference.refine`.

A product by H takes n m² multiplications. There is one for the gradients at the start, one for the new
gradients in every round, and half of one for the systems of every joint grid, which H's symmetry allows.
"""

from __future__ import annotations

from gpu import checks
from gpu.descent import SWEEPS
from gpu.device import Array, xp
from gpu.joint import Ones, corrected, grid_of, residual
from gpu.kernels.descent import descend_rows
from gpu.twin import twin


@twin
def refine(
    W: Array,
    T: Array,
    alpha: Array,
    mu: Array,
    H: Array,
    block_size: int,
    rounds: int = 4,
    descent: bool = True,
) -> tuple[Array, Array, Array, list[float]]:
    """The host waits for the device once a round, to see whether a trit has moved."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    W = checks.matrix(W, "W")
    T = checks.trits(T, W.shape)
    alpha, mu = grid_of(alpha, W.shape, block_size, "alpha"), grid_of(mu, W.shape, block_size, "mu")
    H = checks.gram(H, W.shape[1], "H")
    return refined(W, T, alpha, mu, H, block_size, rounds if descent else 0)


def refined(
    W: Array, T: Array, alpha: Array, mu: Array, H: Array, block_size: int, rounds: int
) -> tuple[Array, Array, Array, list[float]]:
    """Compute `refine` without checking the input; 0 rounds leave the trits alone."""
    T = T.copy(order="C")
    ones = Ones(H, block_size)
    E = residual(W, T, alpha, mu, block_size)
    g = E @ H
    errors = [_product(E, g)]
    for _ in range(rounds):
        alpha, mu, _ = corrected(T, g, alpha, mu, H, ones)
        E = residual(W, T, alpha, mu, block_size)
        g = E @ H
        errors.append(_product(E, g))
        moves = descend_rows(T, g, alpha, H, block_size, SWEEPS)
        errors.append(_product(residual(W, T, alpha, mu, block_size), g))
        if not moves.any():
            break
    else:
        alpha, mu, fall = corrected(T, g, alpha, mu, H, ones)
        errors.append(errors[-1] - fall)
    return alpha, mu, T, [float(error) for error in xp.stack(errors).tolist()]


def _product(A: Array, B: Array) -> Array:
    """Sum the products of entries, as a device scalar; rows first, as a single sum would run on one SM."""
    return (A * B).sum(axis=1).sum()
