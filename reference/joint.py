"""The joint grid: alpha and mu of all blocks of a row at once, for the error of the whole row."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from reference import checks
from reference.checks import Floats

# Share of its diagonal added to a row's system: settles blocks of equal trits, and blocks that H hardly tells
# apart.
RIDGE = 1e-3


def whole_error(W: ArrayLike, W_hat: ArrayLike, H: ArrayLike) -> float:
    r"""What joint grid and descent minimize, :math:`\mathrm{tr}((W - \hat W) H (W - \hat W)^T)`.

    Parameters
    ----------
    W, W_hat : (n, m) array_like
        Weights to reach, and the weights that replace them.
    H : (m, m) array_like
        Damped Gram matrix (`damped_objective`).

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, or H is not a Gram matrix.
    """
    W, W_hat = checks.matrix(W, "W"), checks.matrix(W_hat, "W_hat")
    checks.same_shape("W_hat", W_hat, W.shape)
    E = W - W_hat
    return float(((E @ checks.gram(H, W.shape[1], "H")) * E).sum())


def damped_objective(C: ArrayLike, damping: float) -> Floats:
    """H for the objective of a whole row: damped, but with nothing at stake in a dead input.

    Parameters
    ----------
    C : (m, m) array_like
        Gram matrix.
    damping : float
        Share of the mean of the diagonal added to every diagonal entry that is not 0.

    Returns
    -------
    H : (m, m) float64
        Positive semidefinite; the row and column of a dead input are 0.

    Raises
    ------
    ValueError
        If damping is negative or not finite, or C is not a Gram matrix.
    """
    if not 0 <= damping < np.inf:
        raise ValueError(f"damping must be a finite number that is not negative, got {damping}")
    C = checks.gram(C, np.shape(C)[-1])
    diagonal = np.diag(C)
    return C + np.diag(np.where(diagonal == 0, 0.0, damping * diagonal.mean()))


def spread(grid: ArrayLike, columns: int, block_size: int) -> Floats:
    """Give every column the value of its block.

    Parameters
    ----------
    grid : (n, blocks) array_like
        alpha or mu.
    columns, block_size : int
        Columns of the matrix, and of a block; the last block may have fewer.

    Returns
    -------
    (n, columns) float64

    Raises
    ------
    ValueError
        If the number of blocks does not fit, or block_size is not positive.
    """
    grid = checks.blocks(grid, (len(np.asarray(grid)), columns), block_size, "grid")
    return np.repeat(grid, block_size, axis=1)[:, :columns]


def align_jointly(
    W: ArrayLike,
    T: ArrayLike,
    alpha: ArrayLike,
    mu: ArrayLike,
    H: ArrayLike,
    block_size: int,
    symmetric: bool = False,
) -> tuple[Floats, Floats]:
    r"""Correct alpha and mu of all blocks of every row towards the least `whole_error` for fixed trits.

    Parameters
    ----------
    W : (n, m) array_like
        Weights to reach.
    T : (n, m) array_like
        Trits.
    alpha, mu : (n, blocks) array_like
        Grid to correct.
    H : (m, m) array_like
        As for `whole_error`.
    block_size : int
        Columns in a block; the last may have fewer.
    symmetric : bool
        Whether to correct alpha alone, and leave mu as it is.

    Returns
    -------
    alpha, mu : (n, blocks) float64

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, H is not a Gram matrix, T holds something else than
        trits, or block_size is not positive.

    Notes
    -----
    With :math:`P_i` the 2·blocks rows :math:`t_{ib}` and :math:`1_b`, each 0 outside its block, and
    :math:`A_i = P_i H P_i^T`, the correction solves
    :math:`(A_i + \rho\,\mathrm{diag} A_i)\,x = P_i H (w_i - \hat w_i)^T`. The small ridge
    (:math:`\rho` = `RIDGE`) shortens the correction, so the error falls by
    :math:`x^T (A_i + 2 \rho\,\mathrm{diag} A_i)\,x`, and it never rises. Calls repeated reach dense least
    squares.

    For alpha alone, :math:`P_i` has no rows :math:`1_b`.
    """
    W = checks.matrix(W, "W")
    rows, columns = W.shape
    T = checks.trits(T, W.shape)
    alpha = checks.blocks(alpha, W.shape, block_size, "alpha")
    mu = checks.blocks(mu, W.shape, block_size, "mu")
    H = checks.gram(H, columns, "H")
    starts = np.arange(0, columns, block_size)
    residual = W - (spread(alpha, columns, block_size) * T + spread(mu, columns, block_size))
    pull = residual @ H

    blocks = len(starts)
    A = np.empty((rows, 2 * blocks, 2 * blocks))
    ones = np.add.reduceat(H, starts, axis=0)  # 1_b H, one row a block
    of_ones = np.add.reduceat(ones, starts, axis=1)
    for b, first in enumerate(starts):
        block = slice(first, first + block_size)
        t_H = T[:, block] @ H[block]
        A[:, b, :blocks] = np.add.reduceat(t_H * T, starts, axis=1)
        A[:, b, blocks:] = np.add.reduceat(t_H, starts, axis=1)
    A[:, blocks:, :blocks] = A[:, :blocks, blocks:].transpose(0, 2, 1)
    A[:, blocks:, blocks:] = of_ones
    right = np.hstack([np.add.reduceat(pull * T, starts, axis=1), np.add.reduceat(pull, starts, axis=1)])
    if symmetric:
        A, right = A[:, :blocks, :blocks], right[:, :blocks]

    i = np.arange(A.shape[1])
    diagonal = A[:, i, i]
    # No error depends on a direction without weight: all trits 0, or a block of dead inputs.
    A[:, i, i] = np.where(diagonal > 0, (1 + RIDGE) * diagonal, 1.0)
    correction = np.linalg.solve(A, np.where(diagonal > 0, right, 0.0)[..., None])[..., 0]
    return alpha + correction[:, :blocks], mu if symmetric else mu + correction[:, blocks:]
