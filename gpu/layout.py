"""The packed layout on the device: made here, described in `reference.layout`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gpu import checks
from gpu.device import Array, xp
from gpu.kernels.layout import Layout, can_be_tiled, order_type, pairs_of
from gpu.packing import pack_2bit, unpack_base3
from gpu.twin import twin
from reference.layout import CHUNK, LEAST_BLOCK, PARTS, SPAN, TILE_ROWS, WORD, WORDS
from reference.types import CodedGrid


@twin
def lay_words(trits: Array) -> Array:
    if trits.ndim != 2 or 0 in trits.shape:
        raise ValueError(f"trits must be a non-empty matrix, got shape {trits.shape}")
    n, m = trits.shape
    tiles, chunks = -(-n // TILE_ROWS), -(-m // CHUNK)
    filled = xp.zeros((tiles * TILE_ROWS, chunks * CHUNK), trits.dtype)
    filled[:n, :m] = trits
    words = pack_2bit(filled).view(np.uint32).reshape(tiles, TILE_ROWS, chunks, CHUNK // SPAN, SPAN // WORD)
    return words.transpose(0, 2, 1, 4, 3).reshape(tiles, chunks, TILE_ROWS, WORDS)


@twin
def lay_grid(grid: Array, columns: int, block_size: int) -> Array:
    if grid.dtype not in (np.float16, np.int8):
        raise ValueError(f"grid must be float16 or int8, got {grid.dtype}")
    if not can_be_tiled(block_size):
        raise ValueError(f"block_size must be {LEAST_BLOCK} times a power of 2, got {block_size}")
    checks.same_shape("grid", grid, (*grid.shape[:1], -(-columns // block_size), 2))
    rows = _fill_rows(_by_chunk(grid, columns, block_size))
    tiled = rows.reshape(rows.shape[0] // TILE_ROWS, TILE_ROWS, *rows.shape[1:]).transpose(0, 2, 1, 3, 4)
    return xp.ascontiguousarray(tiled)


@twin
def lay_out(
    packed: Array, scale: Array | CodedGrid, shift: Array | CodedGrid, permutation: Array, block_size: int
) -> Layout:
    order = xp.asarray(permutation)
    m = order.size
    if order.ndim != 1 or m == 0 or not (xp.sort(order) == xp.arange(m)).all():
        raise ValueError(f"permutation must hold every index from 0 to {max(m - 1, 0)} once")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    trits = unpack_base3(packed, m)
    n = trits.shape[0]
    columns = xp.zeros((1, -(-m // CHUNK) * CHUNK), order_type(m))
    columns[0, :m] = order
    words, fields = lay_words(trits), _lay_grids(scale, shift, n, m, block_size)
    return Layout(words, permutation=columns, ends=(n,), columns=m, block_size=block_size, **fields)


@twin
def join(layouts: Sequence[Layout]) -> Layout:
    kinds = {(a.columns, a.block_size, a.grid.dtype.name) for a in layouts}
    if len(kinds) != 1 or sum(len(a.ends) for a in layouts) > PARTS:
        raise ValueError(
            f"1 to {PARTS} matrices with the same columns, block size and type of grid can be joined, "
            f"got {sum(len(a.ends) for a in layouts)} with {sorted(kinds)}"
        )
    ends: list[int] = []
    for layout in layouts:
        begin = ends[-1] if ends else 0
        ends += [begin + end for end in layout.ends]
    names = ["words", "grid", "permutation"]
    if layouts[0].row_factors is not None:
        names += ["row_factors", "block_factors"]
    joined: dict[str, Any] = {
        name: xp.concatenate([getattr(layout, name) for layout in layouts]) for name in names
    }
    in_float16 = all(layout.in_float16 for layout in layouts)
    return replace(layouts[0], ends=tuple(ends), in_float16=in_float16, **joined)


def _lay_grids(
    scale: Array | CodedGrid, shift: Array | CodedGrid, n: int, m: int, block_size: int
) -> dict[str, Any]:
    """The fields of `Layout` that alpha and mu make, by name."""
    values = [grid.decode() if isinstance(grid, CodedGrid) else xp.asarray(grid) for grid in (scale, shift)]
    for name, value in zip(("scale", "shift"), values, strict=True):
        checks.same_shape(name, checks.matrix(value, name), (n, -(-m // block_size)))
    # alpha t + mu is this at the most, in magnitude.
    largest = abs(values[0].astype(np.float64)) + abs(values[1].astype(np.float64))
    fields = {
        "row_factors": None,
        "block_factors": None,
        "in_float16": bool(largest.max() <= np.finfo(np.float16).max),
    }
    kinds = {value.dtype.name for value in values}
    if isinstance(scale, CodedGrid) and isinstance(shift, CodedGrid) and can_be_tiled(block_size):
        _check_factors(scale, shift)
        fields["grid"] = lay_grid(xp.stack([scale.codes, shift.codes], axis=-1), m, block_size)
        fields["row_factors"] = _fill_rows(scale.row[:, 0])
        fields["block_factors"] = _by_chunk(xp.stack([scale.block, shift.block], axis=-1), m, block_size)
    elif kinds == {"float16"} and can_be_tiled(block_size):
        fields["grid"] = lay_grid(xp.stack(values, axis=-1), m, block_size)
    else:
        # Numba's CPU compiler does not know float16.
        wide = np.float32 if kinds <= {"float16", "float32"} else np.float64
        fields["grid"] = _fill_rows(xp.stack([value.astype(wide) for value in values], axis=-1))
    return fields


def _check_factors(scale: CodedGrid, shift: CodedGrid) -> None:
    """Refuse factors that the layout has no place for."""
    n, blocks = scale.codes.shape
    for name, grid in (("scale", scale), ("shift", shift)):
        for kind, shape in (("row", (n, 1)), ("block", (1, blocks))):
            factors = getattr(grid, kind)
            checks.same_shape(f"{name}.{kind}", factors, shape)
            if factors.dtype != np.float16:
                raise ValueError(f"{name}.{kind} must be float16, got {factors.dtype}")
    if not (scale.row == shift.row).all():
        raise ValueError("scale and shift must have the same factors of rows")


def _by_chunk(values: Array, columns: int, block_size: int) -> Array:
    """Pairs of blocks (..., blocks, 2) in their places (..., chunks, pairs, 2), filled up with 0."""
    rows, chunks, pairs = values.shape[:-2], -(-columns // CHUNK), pairs_of(block_size)
    filled = xp.zeros((*rows, chunks * pairs, 2), values.dtype)
    repeated = xp.repeat(values, max(1, block_size // CHUNK), axis=-2)[..., : chunks * pairs, :]
    filled[..., : repeated.shape[-2], :] = repeated
    return filled.reshape(*rows, chunks, pairs, 2)


def _fill_rows(rows: Array) -> Array:
    """Rows (n, ...) with zeros below them, up to a whole tile."""
    filled = xp.zeros((-(-rows.shape[0] // TILE_ROWS) * TILE_ROWS, *rows.shape[1:]), rows.dtype)
    filled[: rows.shape[0]] = rows
    return filled
