"""The packed layout as kernel arguments: device arrays of validated type, shape and alignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu import checks
from gpu.device import STANDIN, Array, xp
from reference.layout import CHUNK, LEAST_BLOCK, PARTS, TILE_ROWS, WORDS
from reference.layout import Layout as HostLayout


@dataclass(frozen=True)
class Layout(HostLayout):
    """A `reference.layout.Layout` of device arrays; `part` reads back what was moved to the host.

    Raises
    ------
    TypeError, ValueError
        If the type or shape of an array differs from `reference.layout`, or an array is not contiguous or
        is on another device than the others.
    """

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if not 0 < len(self.ends) <= PARTS or any(b <= a for a, b in zip((0, *self.ends), self.ends)):  # noqa: B905
            raise ValueError(f"ends must be 1 to {PARTS} increasing row numbers, got {self.ends}")
        if self.columns < 1:
            raise ValueError(f"columns must be at least 1, got {self.columns}")
        tiles, chunks = self.tiles_of_parts()[-1][1], -(-self.columns // CHUNK)
        # Kernels load 128 bits at a time.
        device_array("words", self.words, ("uint32",), 4, 16)
        checks.same_shape("words", self.words, (tiles, chunks, TILE_ROWS, WORDS))
        device_array("permutation", self.permutation, (order_type(self.columns).name,), 2, 16)
        checks.same_shape("permutation", self.permutation, (len(self.ends), chunks * CHUNK))
        kinds = ("float16", "int8") if self.tiled else ("float32", "float64")
        device_array("grid", self.grid, kinds, 5 if self.tiled else 3, 16)
        tiled = (tiles, chunks, TILE_ROWS, pairs_of(self.block_size), 2)
        plain = (tiles * TILE_ROWS, -(-self.columns // self.block_size), 2)
        checks.same_shape("grid", self.grid, tiled if self.tiled else plain)
        coded = self.grid.dtype == np.int8
        for name, factors, shape in (
            ("row_factors", self.row_factors, (tiles * TILE_ROWS,)),
            ("block_factors", self.block_factors, (len(self.ends), *tiled[1:2], *tiled[3:])),
        ):
            if (factors is not None) != coded:
                raise ValueError(f"{name} are {'needed' if coded else 'not'} for a grid of {self.grid.dtype}")
            if factors is not None:
                device_array(name, factors, ("float16",), len(shape), 4)
                checks.same_shape(name, factors, shape)
                same_device(name, factors, self.words)
        same_device("grid", self.grid, self.words)
        same_device("permutation", self.permutation, self.words)

    @property
    def tiled(self) -> bool:
        """Whether alpha and mu are in the layout of the fast kernels."""
        return self.grid.ndim == 5

    @property
    def tiles(self) -> int:
        """Number of tiles of 32 rows, over all parts."""
        return self.words.shape[0]

    @property
    def pairs_shift(self) -> int:
        """Base-2 logarithm of the number of pairs per row and chunk."""
        return self.grid.shape[3].bit_length() - 1

    def tiles_of_parts(self) -> list[tuple[int, int]]:
        """The first tile of every part, and the one after its last; the reference's is only its oracle."""
        found, first = [], 0
        for begin, end in zip((0, *self.ends), self.ends):  # noqa: B905
            last = first + -(-(end - begin) // TILE_ROWS)
            found.append((first, last))
            first = last
        return found

    def plain_grid(self, part: int) -> Array:
        """Return alpha and mu of a part, (rows, blocks, 2) float32 or wider."""
        first, last = self.tiles_of_parts()[part]
        if not self.tiled:
            return self.grid[first * TILE_ROWS : last * TILE_ROWS]
        tiles, chunks, _, pairs, _ = self.grid[first:last].shape
        grid = self.grid[first:last].astype(np.float32).transpose(0, 2, 1, 3, 4)
        if self.row_factors is not None and self.block_factors is not None:
            rows = self.row_factors[first * TILE_ROWS : last * TILE_ROWS].astype(np.float32)
            factors = rows.reshape(tiles, TILE_ROWS, 1, 1, 1) * self.block_factors[part].astype(np.float32)
            grid = factors * grid
        grid = grid.reshape(tiles * TILE_ROWS, chunks * pairs, 2)
        blocks = -(-self.columns // self.block_size)
        return xp.ascontiguousarray(grid[:, :: max(1, self.block_size // CHUNK)][:, :blocks])


def order_type(columns: int) -> np.dtype[Any]:
    """Return the dtype of column indices."""
    return np.dtype(np.uint16 if columns <= 2**16 else np.uint32)


def pairs_of(block_size: int) -> int:
    """Number of pairs of alpha and mu per row and chunk, for blocks of whole spans."""
    return max(1, CHUNK // block_size)


def can_be_tiled(block_size: int) -> bool:
    """Whether blocks have 64, 128, 256, 512, ... columns, as the tiled layout requires."""
    return block_size >= LEAST_BLOCK and block_size & (block_size - 1) == 0


def device_array(name: str, array: Any, dtypes: tuple[str, ...], ndim: int, alignment: int = 1) -> None:
    """Refuse an array that a kernel cannot read directly."""
    if not isinstance(array, xp.ndarray):
        raise TypeError(f"{name} must be an array of {xp.__name__}, got {type(array).__name__}")
    if array.dtype.name not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(dtypes)}, got {array.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {array.shape}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous in C order, got strides {array.strides}")
    # Arrays of other libraries may start at any address, and a kernel cannot report misalignment.
    if not STANDIN and array.data.ptr % max(alignment, array.dtype.itemsize):
        raise ValueError(f"{name} must begin at a multiple of {max(alignment, array.dtype.itemsize)} bytes")


def same_device(name: str, array: Array, words: Array) -> None:
    """Refuse an array on another device than the words, or not on the current device."""
    if array.device != words.device:
        raise ValueError(f"{name} is on device {array.device}, words are on {words.device}")
    if not STANDIN and array.device != xp.cuda.Device():
        raise ValueError(f"{name} is on device {array.device}, the current one is {xp.cuda.Device()}")
