"""Rounds of joint grid and coordinate descent over whole rows, after every block has been fitted."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from reference import checks
from reference.checks import Floats, Trits
from reference.descent import descend
from reference.joint import align_jointly, spread, whole_error


def refine(
    W: ArrayLike,
    T: ArrayLike,
    alpha: ArrayLike,
    mu: ArrayLike,
    H: ArrayLike,
    block_size: int,
    rounds: int = 4,
    descent: bool = True,
    symmetric: bool = False,
) -> tuple[Floats, Floats, Trits, list[float]]:
    """Alternate `align_jointly` and `descend` until no trit changes, and end with a grid.

    Parameters
    ----------
    W : (n, m) array_like
        Weights to reach.
    T : (n, m) array_like
        Trits.
    alpha, mu : (n, blocks) array_like
        Grid.
    H : (m, m) array_like
        Damped Gram matrix (`reference.joint.damped_objective`).
    block_size : int
        Columns in a block; the last may have fewer.
    rounds : int
        Most rounds.
    descent : bool
        Whether trits move; without it, one joint grid is all there is to do.
    symmetric : bool
        Whether to correct alpha alone, and leave mu as it is.

    Returns
    -------
    alpha, mu : (n, blocks) float64
    T : (n, m) int8
    errors : list of float
        `whole_error` at the start and after every step. It never rises by more than rounding.

    Raises
    ------
    ValueError
        As for `align_jointly`, or if rounds is not positive.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    W = checks.matrix(W, "W")
    trits = checks.trits(T, W.shape)
    columns = W.shape[1]
    grid = (
        checks.blocks(alpha, W.shape, block_size, "alpha"),
        checks.blocks(mu, W.shape, block_size, "mu"),
    )

    def error() -> float:
        scale, shift = (spread(part, columns, block_size) for part in grid)
        return whole_error(W, scale * trits + shift, H)

    errors = [error()]
    for _ in range(rounds if descent else 0):
        grid = align_jointly(W, trits, *grid, H, block_size, symmetric)
        errors.append(error())
        moved = descend(W, trits, *grid, H, block_size)
        unchanged = np.array_equal(moved, trits)
        trits = moved
        errors.append(error())
        if unchanged:
            return *grid, trits, errors
    grid = align_jointly(W, trits, *grid, H, block_size, symmetric)
    return *grid, trits, [*errors, error()]
