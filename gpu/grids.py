"""Encode alpha and mu as 8-bit codes with factors; see `reference.grids`."""

from __future__ import annotations

import numpy as np

from gpu import checks
from gpu.device import Array, xp
from gpu.twin import twin
from reference.types import CODE_LIMIT, CodedGrid


@twin
def row_factor(W: Array) -> Array:
    W = checks.matrix(W, "W")
    size = xp.sqrt(xp.square(W, dtype=np.float64).mean(axis=1, keepdims=True))
    with np.errstate(over="ignore"):
        factor = size.astype(np.float16)
    if not xp.isfinite(factor).all():
        row = int(xp.argmax(size))
        largest = float(size[row, 0])
        raise ValueError(f"the weights of row {row} have a root mean square of {largest:.6g}, beyond float16")
    return factor


@twin
def encode(value: Array, row: Array) -> CodedGrid:
    grid = coded(checks.column(value, row.shape[0], "value"), row)
    require_coded(grid, value, row)
    return grid


def coded(value: Array, row: Array) -> CodedGrid:
    """Compute `encode` without checking the input or the range of the block's factor; see `require_coded`."""
    share = _shares(value, row)
    with np.errstate(over="ignore", invalid="ignore"):
        block = (abs(share).max(axis=0, keepdims=True) / CODE_LIMIT).astype(np.float16)
        codes = xp.rint(share / xp.where(block == 0, 1, block.astype(np.float64)))
        # `require_coded` refuses an infinite factor later.
        codes = xp.where(xp.isfinite(codes), xp.clip(codes, -CODE_LIMIT, CODE_LIMIT), 0)
    return CodedGrid(codes.astype(np.int8), row, block)


def require_coded(grid: CodedGrid, value: Array, row: Array) -> None:
    """Refuse factors of blocks beyond float16; `value` (n, blocks) holds the numbers that were encoded."""
    finite = xp.isfinite(grid.block)
    if not finite.all():
        largest = float(abs(_shares(value, row)).max())
        raise ValueError(f"a value is {largest:.6g} times its row's weights, beyond float16")


def _shares(value: Array, row: Array) -> Array:
    wide = row.astype(np.float64)
    return xp.where(wide == 0, 0.0, value / xp.where(wide == 0, 1.0, wide))
