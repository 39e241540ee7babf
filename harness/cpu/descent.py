"""Coordinate descent compiled by Numba: row by row, reading a row of H only when a trit moves."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.cpu.compiled import compiled
from reference import checks
from reference.checks import Trits
from reference.descent import MARGIN, SWEEPS
from reference.joint import spread

__all__ = ["descend", "descend_rows"]


def descend(W: Any, T: Any, alpha: Any, mu: Any, H: Any, block_size: int, sweeps: int = SWEEPS) -> Trits:
    if sweeps < 0:
        raise ValueError(f"sweeps must not be negative, got {sweeps}")
    W = checks.matrix(W, "W")
    T = checks.trits(T, W.shape).copy()
    H = np.ascontiguousarray(checks.gram(H, W.shape[1], "H"))
    alpha = checks.blocks(alpha, W.shape, block_size, "alpha")
    mu = checks.blocks(mu, W.shape, block_size, "mu")
    g = (W - (spread(alpha, W.shape[1], block_size) * T + spread(mu, W.shape[1], block_size))) @ H
    descend_rows(T, g, alpha, H, block_size, sweeps, MARGIN)
    return T


@compiled()
def descend_rows(T: Any, g: Any, alpha: Any, H: Any, block_size: int, sweeps: int, margin: float) -> int:
    """Move trits in place, and the gradients with them.

    Parameters
    ----------
    T : (n, m) int8 array
        Trits.
    g : (n, m) array
        (W - W_hat) @ H, in the dtype of H.
    alpha : (n, blocks) float64 array
        Scales.
    H : (m, m) array
        Damped Gram matrix, in C order.
    block_size, sweeps : int
        Columns in a block, and most passes over the columns.
    margin : float
        `reference.descent.MARGIN`.

    Returns
    -------
    int
        Number of moves.
    """
    rows, columns = T.shape
    moves = 0
    for i in range(rows):
        for _ in range(sweeps):
            moved = 0
            for j in range(columns):
                step = alpha[i, j // block_size]
                cost = step * H[j, j]
                if cost == 0:
                    continue
                t = min(1.0, max(-1.0, np.rint(T[i, j] + g[i, j] / cost)))
                if t == T[i, j]:
                    continue
                d = step * (t - T[i, j])
                if d * (d * H[j, j] - 2 * g[i, j]) < -margin * step * cost:
                    T[i, j] = np.int8(t)
                    moved += 1
                    h = H[j]
                    row = g[i]
                    d = row.dtype.type(d)
                    for other in range(columns):
                        row[other] -= d * h[other]
            moves += moved
            if moved == 0:
                break
    return moves
