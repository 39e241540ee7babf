"""What a checkpoint stores of alpha and mu in 8 bits; see `reference.grids`."""

from __future__ import annotations

import numpy as np

from gpu import checks
from gpu.device import Array, xp
from reference.types import CODE_LIMIT, CodedGrid


def row_factor(W: Array) -> Array:
    """The factor of every row: the root mean square of its weights.

    Parameters
    ----------
    W : (n, m) float32 or float64
        Weights.

    Returns
    -------
    (n, 1) float16

    Raises
    ------
    ValueError
        If W is not a finite matrix, or a factor is beyond what float16 holds.
    """
    W = checks.matrix(W, "W")
    size = xp.sqrt(xp.square(W, dtype=np.float64).mean(axis=1, keepdims=True))
    with np.errstate(over="ignore"):
        factor = size.astype(np.float16)
    if not xp.isfinite(factor).all():
        row = int(xp.argmax(size))
        largest = float(size[row, 0])
        raise ValueError(f"the weights of row {row} have a root mean square of {largest:.6g}, beyond float16")
    return factor


def encode(value: Array, row: Array) -> CodedGrid:
    """alpha or mu of one block in 8 bits.

    Parameters
    ----------
    value : (n, 1) array
        Values of the block.
    row : (n, 1) float16
        Factors of the rows; where one is 0 the value is taken to be 0.

    Returns
    -------
    CodedGrid
        Of one block: every value to the nearest of 255 that its row has there, the largest of which
        the row that needs it most reaches.

    Raises
    ------
    ValueError
        If a value is not finite, or the factor of the block is beyond what float16 holds.
    """
    grid = coded(checks.column(value, row.shape[0], "value"), row)
    require_coded(grid, value, row)
    return grid


def coded(value: Array, row: Array) -> CodedGrid:
    """`encode` of input that has been checked, unchecked for a factor beyond float16."""
    share = _shares(value, row)
    with np.errstate(over="ignore", invalid="ignore"):
        block = (abs(share).max(axis=0, keepdims=True) / CODE_LIMIT).astype(np.float16)
        codes = xp.rint(share / xp.where(block == 0, 1, block.astype(np.float64)))
        # An infinite factor is refused in the end.
        codes = xp.where(xp.isfinite(codes), xp.clip(codes, -CODE_LIMIT, CODE_LIMIT), 0)
    return CodedGrid(codes.astype(np.int8), row, block)


def require_coded(grid: CodedGrid, value: Array, row: Array) -> None:
    """Refuse a factor of a block that is beyond float16; `value` (n, blocks) is what was coded."""
    finite = xp.isfinite(grid.block)
    if not finite.all():
        largest = float(abs(_shares(value, row)).max())
        raise ValueError(f"a value is {largest:.6g} times its row's weights, beyond float16")


def _shares(value: Array, row: Array) -> Array:
    wide = row.astype(np.float64)
    return xp.where(wide == 0, 0.0, value / xp.where(wide == 0, 1.0, wide))
