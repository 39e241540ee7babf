"""Rounds of joint grid and descent over whole rows, in float64; see `reference.refine`.

Where the time goes, for (n, m) matrices in blocks of 128, four rounds, and descents that move a tenth of the
trits in all; reasoned, not measured:

- products by H, n m² multiplications each (`products`): 9
- what the systems read and write, 17 bytes for a row, block and later column: 0.3 n m² bytes
- their factors, n (2 m / 128)³ / 6 multiplications each time, which a batch of small systems does slowly
- rows of H for moved trits, 0.8 n m² bytes, most from the L2 cache, and gradients, 0.5 n m² bytes

n m² is 1.1e12 in a layer of a 7B model (four matrices of 4096 x 4096, two of 11008 x 4096, one of 4096 x
11008). So an H200, with some 50 TFLOPS of float64 products and 4.8 TB/s, takes 0.4 s for the products of a
layer, and as much again for the rest; a GPU with 1 TFLOPS takes 20 s.
"""

from __future__ import annotations

from gpu import checks
from gpu.descent import SWEEPS
from gpu.device import Array, xp
from gpu.joint import Ones, corrected, grid_of, residual
from gpu.kernels.descent import descend_rows
from gpu.twin import twin
from reference.types import TernaryConfig


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
    symmetric: bool = False,
) -> tuple[Array, Array, Array, list[float]]:
    """The host waits for the device once a round, to see whether a trit has moved."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    W = checks.matrix(W, "W")
    T = checks.trits(T, W.shape)
    alpha, mu = grid_of(alpha, W.shape, block_size, "alpha"), grid_of(mu, W.shape, block_size, "mu")
    H = checks.gram(H, W.shape[1], "H")
    return refined(W, T, alpha, mu, H, block_size, rounds if descent else 0, symmetric)


def refined(
    W: Array, T: Array, alpha: Array, mu: Array, H: Array, block_size: int, rounds: int, symmetric: bool
) -> tuple[Array, Array, Array, list[float]]:
    """Compute `refine` without checking the input; 0 rounds leave the trits alone."""
    T = T.copy(order="C")
    ones = Ones(H, block_size, symmetric)
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


def products(config: TernaryConfig) -> float:
    """How many products by H the refinement in `gpu.ternarize` takes at most, with n m² multiplications each.

    There is one for the gradients at the start, one for those after each joint grid of a round, one for those
    of the last descent, half of one for the systems of each joint grid, and as much for the power of W; these
    use the symmetry of H.
    """
    if config.refinement == "none":
        return 0.0
    rounds = config.rounds if config.refinement == "descent" else 0
    return 1 + rounds + bool(rounds) + (rounds + 1) / 2 + 1 / 2


def _product(A: Array, B: Array) -> Array:
    """Sum the products of entries, as a device scalar; rows first, as a single sum would run on one SM."""
    return (A * B).sum(axis=1).sum()
