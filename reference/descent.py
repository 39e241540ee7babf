"""Coordinate descent on the trits of whole rows, with the grid fixed."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from reference import checks
from reference.checks import Trits
from reference.joint import spread

# A trit moves if the error falls by more than this share of what a whole step of it costs: rounding could
# let a trit whose step changes nothing go to and fro for ever.
MARGIN = 1e-7

# Most passes over the columns.
SWEEPS = 8

# Columns whose gradients are kept up to date at every step; the others are updated once a block.
LAZY_COLUMNS = 128


def descend(
    W: ArrayLike,
    T: ArrayLike,
    alpha: ArrayLike,
    mu: ArrayLike,
    H: ArrayLike,
    block_size: int,
    sweeps: int = SWEEPS,
) -> Trits:
    r"""Move one trit after the other to where `reference.joint.whole_error` is least.

    Parameters
    ----------
    W : (n, m) array_like
        Weights to reach.
    T : (n, m) array_like
        Trits to start from.
    alpha, mu : (n, blocks) array_like
        Grid.
    H : (m, m) array_like
        Damped Gram matrix, as for `reference.joint.whole_error`.
    block_size : int
        Columns in a block; the last may have fewer.
    sweeps : int
        Most passes over the columns.

    Returns
    -------
    T : (n, m) int8
        Unless the sweeps ran out, no change of a single trit lowers the error by more than `MARGIN`.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, H is not a Gram matrix, T holds something else than
        trits, block_size is not positive, or sweeps is negative.

    Notes
    -----
    With :math:`g = (w - \hat w) H`, changing :math:`\hat w_j` by d changes the error of a row by
    :math:`d^2 H_{jj} - 2 d g_j`: for trit j it is least at
    :math:`t_j + g_j / (\alpha H_{jj})`, rounded and clamped to -1, 0, +1. After a move,
    :math:`g` falls by :math:`d H_j`. Rows with alpha = 0 and dead inputs have nothing to gain.
    """
    if sweeps < 0:
        raise ValueError(f"sweeps must not be negative, got {sweeps}")
    W = checks.matrix(W, "W")
    T = checks.trits(T, W.shape).copy()
    columns = W.shape[1]
    alpha = checks.blocks(alpha, W.shape, block_size, "alpha")
    mu = checks.blocks(mu, W.shape, block_size, "mu")
    H = checks.gram(H, columns, "H")
    scale = spread(alpha, columns, block_size)
    g = (W - (scale * T + spread(mu, columns, block_size))) @ H

    for _ in range(sweeps):
        changed = False
        for first in range(0, columns, LAZY_COLUMNS):
            lazy = slice(first, min(first + LAZY_COLUMNS, columns))
            moves = np.zeros((len(W), lazy.stop - first))
            for j in range(first, lazy.stop):
                step = scale[:, j]
                cost = step * H[j, j]
                best = T[:, j] + np.divide(g[:, j], cost, out=np.zeros_like(step), where=cost != 0)
                t = np.clip(np.rint(best), -1, 1).astype(np.int8)
                d = step * (t - T[:, j])
                gains = d * (d * H[j, j] - 2 * g[:, j]) < -MARGIN * step**2 * H[j, j]
                if gains.any():
                    changed = True
                    d = np.where(gains, d, 0.0)
                    T[gains, j] = t[gains]
                    moves[:, j - first] = d
                    g[:, lazy] -= d[:, None] * H[j, lazy]
            elsewhere = np.r_[0:first, lazy.stop : columns]
            g[:, elsewhere] -= moves @ H[lazy, elsewhere]
        if not changed:
            break
    return T
