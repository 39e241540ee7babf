"""The joint grid of all rows from one product of trits and H; see `reference.joint`."""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import checks
from reference.checks import Floats
from reference.joint import RIDGE, damped_objective, spread, whole_error

__all__ = ["align_jointly", "correct", "damped_objective", "spread", "whole_error"]


def align_jointly(
    W: Any, T: Any, alpha: Any, mu: Any, H: Any, block_size: int, symmetric: bool = False
) -> tuple[Floats, Floats]:
    W = checks.matrix(W, "W")
    T = checks.trits(T, W.shape)
    H = checks.gram(H, W.shape[1], "H")
    alpha = checks.blocks(alpha, W.shape, block_size, "alpha")
    mu = checks.blocks(mu, W.shape, block_size, "mu")
    return correct(W, W @ H, T, alpha, mu, H, block_size, symmetric)[:2]


def correct(
    W: Any, WH: Any, T: Any, alpha: Floats, mu: Floats, H: Any, block_size: int, symmetric: bool
) -> tuple[Floats, Floats, float, float]:
    """Correct a joint grid; products are computed in the dtype of H, systems in float64.

    Parameters
    ----------
    W, WH : (n, m) arrays
        Weights to reach, and their product with H.
    T : (n, m) int8 array
        Trits.
    alpha, mu : (n, blocks) float64 arrays
        Grid to correct.
    H : (m, m) array
        Damped Gram matrix.
    block_size : int
        Columns in a block.
    symmetric : bool
        Whether to correct alpha alone.

    Returns
    -------
    alpha, mu : (n, blocks) float64 arrays
    before, after : float
        `whole_error` before and after the correction.
    """
    rows, columns = T.shape
    starts = np.arange(0, columns, block_size)
    blocks = len(starts)
    T = T.astype(H.dtype)
    scale, shift = alpha.astype(H.dtype), mu.astype(H.dtype)
    ones = np.add.reduceat(H, starts, axis=0)
    unknowns = blocks if symmetric else 2 * blocks
    A = np.empty((rows, unknowns, unknowns))
    pull = WH - shift @ ones  # (W - W_hat) H, once the blocks' own parts are taken off
    for b, first in enumerate(starts):
        block = slice(first, first + block_size)
        t_H = T[:, block] @ H[block]
        if not symmetric:
            A[:, b, blocks:] = np.add.reduceat(t_H, starts, axis=1)
        pull -= scale[:, b : b + 1] * t_H
        t_H *= T
        A[:, b, :blocks] = np.add.reduceat(t_H, starts, axis=1)
    if not symmetric:
        A[:, blocks:, :blocks] = A[:, :blocks, blocks:].transpose(0, 2, 1)
        A[:, blocks:, blocks:] = np.add.reduceat(ones, starts, axis=1)
    residual = W - (spread(alpha, columns, block_size) * T + spread(mu, columns, block_size))
    before = float(np.einsum("ij,ij->", residual, pull, dtype=np.float64))
    of_ones = np.add.reduceat(pull, starts, axis=1)
    pull *= T
    right = np.hstack([np.add.reduceat(pull, starts, axis=1), of_ones])[:, :unknowns].astype(np.float64)

    i = np.arange(unknowns)
    diagonal = A[:, i, i]
    right[diagonal <= 0] = 0.0
    A[:, i, i] = np.where(diagonal > 0, (1 + RIDGE) * diagonal, 1.0)
    x = np.linalg.solve(A, right[..., None])[..., 0]
    after = before - float((x * right).sum() + RIDGE * (np.maximum(diagonal, 0) * x * x).sum())
    return alpha + x[:, :blocks], mu if symmetric else mu + x[:, blocks:], before, after
