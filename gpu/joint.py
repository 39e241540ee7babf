"""The joint grid of all blocks of a row, in float64; see `reference.joint`."""

from __future__ import annotations

import numpy as np

from gpu import checks
from gpu.aga import quadratic_form
from gpu.device import Array, solve_systems, xp
from gpu.gptq import check_damping
from gpu.kernels.segments import match_rows
from gpu.twin import twin
from reference.joint import RIDGE

# Bytes of the systems that are made and solved at a time. Solving copies them. A chunk is still as many rows
# as a library needs to be fast: 1134 for the 86 blocks of a 7B model's widest matrices.
SYSTEM_BYTES = 256 << 20


@twin
def whole_error(W: Array, W_hat: Array, H: Array) -> float:
    W, W_hat = checks.matrix(W, "W"), checks.matrix(W_hat, "W_hat")
    checks.same_shape("W_hat", W_hat, W.shape)
    H = checks.gram(H, W.shape[1], "H")
    return float(quadratic_form(W.astype(np.float64, copy=False) - W_hat, H))


@twin
def damped_objective(C: Array, damping: float) -> Array:
    check_damping(damping)
    return damp_alive(checks.gram(C, C.shape[-1]).copy(), damping)


def damp_alive(C: Array, damping: float) -> Array:
    """Overwrite C by its `damped_objective`, without checking the input."""
    diagonal, every = xp.diagonal(C).copy(), xp.arange(C.shape[0])
    C[every, every] = xp.where(diagonal == 0, 0.0, diagonal + damping * diagonal.mean())
    return C


@twin
def spread(grid: Array, columns: int, block_size: int) -> Array:
    grid = checks.matrix(grid, "grid")
    return spread_grid(grid_of(grid, (grid.shape[0], columns), block_size, "grid"), columns, block_size)


def spread_grid(grid: Array, columns: int, block_size: int) -> Array:
    """Compute `spread` in the type of the grid, without checking it."""
    return xp.repeat(grid, block_size, axis=1)[:, :columns]


def grid_of(value: Array, shape: tuple[int, int], block_size: int, name: str) -> Array:
    """Check a grid of all blocks of a matrix of this shape; return it in float64."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    grid = checks.matrix(value, name).astype(np.float64, copy=False)
    checks.same_shape(name, grid, (shape[0], -(-shape[1] // block_size)))
    return grid


def residual(W: Array, T: Array, alpha: Array, mu: Array, block_size: int) -> Array:
    """Compute the error W - W_hat, (n, m) float64."""
    columns = W.shape[1]
    W_hat = spread_grid(alpha, columns, block_size) * T
    W_hat += spread_grid(mu, columns, block_size)
    return xp.subtract(W, W_hat, out=W_hat)


@twin
def align_jointly(
    W: Array, T: Array, alpha: Array, mu: Array, H: Array, block_size: int, symmetric: bool = False
) -> tuple[Array, Array]:
    W = checks.matrix(W, "W")
    T = checks.trits(T, W.shape)
    H = checks.gram(H, W.shape[1], "H")
    alpha, mu = grid_of(alpha, W.shape, block_size, "alpha"), grid_of(mu, W.shape, block_size, "mu")
    g = residual(W, T, alpha, mu, block_size) @ H
    alpha, mu, _ = corrected(T, g, alpha, mu, H, Ones(H, block_size, symmetric))
    return alpha, mu


class Ones:
    """What the systems of all rows share.

    Attributes
    ----------
    block_size : int
        Columns in a block; the last may have fewer.
    symmetric : bool
        Whether to correct alpha alone, so that the systems have no rows and columns of mu.
    indicator : (blocks, m) float64
        1 in the columns of each block. Sums over blocks are products with it.
    products : (blocks, m) float64
        Its product with H.
    """

    def __init__(self, H: Array, block_size: int, symmetric: bool) -> None:
        self.block_size, self.symmetric = block_size, symmetric
        self.indicator = spread_grid(xp.eye(-(-len(H) // block_size)), len(H), block_size)
        self.products = self.indicator @ H


def corrected(
    T: Array, g: Array, alpha: Array, mu: Array, H: Array, ones: Ones
) -> tuple[Array, Array, Array]:
    """Compute `align_jointly` from gradients, without checking the input or waiting for the device.

    Parameters
    ----------
    T : (n, m) int8
        Trits.
    g : (n, m) float64
        (W - W_hat) H.
    alpha, mu : (n, blocks) float64
        Grid to correct.
    H : (m, m) float64
        Damped Gram matrix.
    ones : Ones
        Of this H.

    Returns
    -------
    alpha, mu : (n, blocks) float64
    fall : () float64
        By how much the error falls.
    """
    n, blocks = alpha.shape
    unknowns = blocks if ones.symmetric else 2 * blocks
    rows = max(1, SYSTEM_BYTES // (8 * unknowns**2))
    every = xp.arange(unknowns)
    correction, fall = xp.empty((n, unknowns)), xp.zeros(())
    for first in range(0, n, rows):
        some = slice(first, first + rows)
        A = _systems(T[some], H, ones)
        pull = match_rows(g[some], T[some], 0, ones.block_size)
        if not ones.symmetric:
            pull = xp.concatenate([pull, g[some] @ ones.indicator.T], axis=1)
        diagonal = A[:, every, every]
        weighty = diagonal > 0
        right = xp.where(weighty, pull, 0.0)
        A[:, every, every] = xp.where(weighty, (1 + RIDGE) * diagonal, 1.0)
        x = solve_systems(A, right)
        fall += (x * (right + RIDGE * xp.where(weighty, diagonal, 0.0) * x)).sum(axis=1).sum()
        correction[some] = x
    return alpha + correction[:, :blocks], mu if ones.symmetric else mu + correction[:, blocks:], fall


def _systems(T: Array, H: Array, ones: Ones) -> Array:
    """Compute P_i H P_i^T of every row, (n, 2 blocks, 2 blocks), or for alpha alone (n, blocks, blocks)."""
    k, blocks = ones.block_size, len(ones.indicator)
    unknowns = blocks if ones.symmetric else 2 * blocks
    A = xp.empty((len(T), unknowns, unknowns))
    for b in range(blocks):
        block = slice(b * k, (b + 1) * k)
        own = T[:, block].astype(np.float64)
        # H is symmetric: columns before the block are those of earlier blocks.
        A[:, b, b:blocks] = match_rows(own @ H[block, b * k :], T, b * k, k)
        A[:, b:blocks, b] = A[:, b, b:blocks]
        if not ones.symmetric:
            A[:, b, blocks:] = own @ ones.products[:, block].T
    if not ones.symmetric:
        A[:, blocks:, :blocks] = A[:, :blocks, blocks:].transpose(0, 2, 1)
        A[:, blocks:, blocks:] = ones.products @ ones.indicator.T
    return A
