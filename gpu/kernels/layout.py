"""How ternary matrices lie in the memory of a device, for all kernels that multiply with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu import checks
from gpu.device import STANDIN, Array, xp
from gpu.packing import pack_2bit
from reference.layout import CHUNK, LEAST_BLOCK, PARTS, TILE_ROWS, WORDS


@dataclass(frozen=True)
class Layout:
    """A ternary matrix as kernels read it; or several, parts, that multiply the same x.

    Rows of all parts lie one below the other, each part filled up to whole tiles of 32 rows; columns, in
    the order of quantization, to whole chunks of 256. What fills up is t = 0, and alpha and mu are 0 there.

    Attributes
    ----------
    words : (tiles, chunks, 32, 16) uint32
        Trits: t + 1 of trits 16w to 16w + 15 of a row and chunk, in two bits each, makes word w, from the
        lowest bits up. Word 4r + t is stored at 4t + r: the four lanes of a warp that share a row load 128
        bits each, and hold 64 consecutive columns in their r-th words, which lie in one block. 16 rows of
        a chunk are 1 KiB that lies together.
    grid : (tiles, chunks, 32, pairs, 2) float16 or int8, or (32 tiles, blocks, 2) float32 or float64
        alpha and mu. Of the first form, for blocks of 64, 128, 256, 512, ... columns, are those that fast
        kernels read: 4, 2, 1, 1, ... pairs for every row and chunk. int8 are codes.
    permutation : (parts, 256 chunks) uint16, or uint32 beyond 65536 columns
        Original column of every trit of a part, each once; filled up with 0. Fast kernels read uint16, as
        every processor reads all of it.
    ends : tuple of int
        Rows of y up to which every part reaches; the last is n.
    columns : int
        m.
    block_size : int
        Columns in a block; the last may have fewer.
    row_factors : (32 tiles,) float16, or None
        Of a grid of codes: the factor of a row, as in `reference.types.CodedGrid`.
    block_factors : (parts, chunks, pairs, 2) float16, or None
        Likewise of a block, for alpha and for mu.
    in_float16 : bool
        Whether |alpha| + |mu| of every block is within float16, so that every weight is.

    Raises
    ------
    TypeError, ValueError
        If an array is not of this type and shape, not contiguous, or not on the device of the others.
    """

    words: Array
    grid: Array
    permutation: Array
    ends: tuple[int, ...]
    columns: int
    block_size: int
    row_factors: Array | None = None
    block_factors: Array | None = None
    in_float16: bool = False

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if not 0 < len(self.ends) <= PARTS or any(b <= a for a, b in zip((0, *self.ends), self.ends)):  # noqa: B905
            raise ValueError(f"ends must be 1 to {PARTS} numbers of rows that increase, got {self.ends}")
        if self.columns < 1:
            raise ValueError(f"columns must be at least 1, got {self.columns}")
        tiles, chunks = self.tiles_of_parts()[-1][1], -(-self.columns // CHUNK)
        # Aligned to 128 bits, which is what kernels load at a time.
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
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        return self.ends[-1], self.columns

    @property
    def tiled(self) -> bool:
        """Whether alpha and mu lie as fast kernels read them."""
        return self.grid.ndim == 5

    @property
    def tiles(self) -> int:
        """Tiles of 32 rows of all parts."""
        return self.words.shape[0]

    @property
    def pairs_shift(self) -> int:
        """Logarithm of the pairs of a row and chunk."""
        return self.grid.shape[3].bit_length() - 1

    def tiles_of_parts(self) -> list[tuple[int, int]]:
        """The first tile of every part, and the one after its last."""
        found, first = [], 0
        for begin, end in zip((0, *self.ends), self.ends):  # noqa: B905
            last = first + -(-(end - begin) // TILE_ROWS)
            found.append((first, last))
            first = last
        return found

    def plain_grid(self, part: int) -> Array:
        """alpha and mu of a part, (rows, blocks, 2) float32 or wider."""
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
    """What holds the indices of columns."""
    return np.dtype(np.uint16 if columns <= 2**16 else np.uint32)


def pairs_of(block_size: int) -> int:
    """Pairs of alpha and mu of a row and chunk, for blocks that are whole spans."""
    return max(1, CHUNK // block_size)


def can_be_tiled(block_size: int) -> bool:
    """Whether blocks are 64, 128, 256, 512, ... columns."""
    return block_size >= LEAST_BLOCK and block_size & (block_size - 1) == 0


def lay_words(trits: Array) -> Array:
    """Trits (n, m) of one part as `Layout.words`."""
    m = trits.shape[1]
    chunks = -(-m // CHUNK)
    filled = xp.zeros((-(-trits.shape[0] // TILE_ROWS) * TILE_ROWS, chunks * CHUNK), np.int8)
    filled[: trits.shape[0], :m] = trits
    words = pack_2bit(filled).view(np.uint32).reshape(-1, TILE_ROWS, chunks, 4, 4)
    ordered = words.transpose(0, 2, 1, 4, 3)
    return xp.ascontiguousarray(ordered).reshape(-1, chunks, TILE_ROWS, WORDS)


def lay_grid(grid: Array, chunks: int, block_size: int) -> Array:
    """alpha and mu (n, blocks, 2) of one part as a tiled `Layout.grid`."""
    rows = fill_rows(spread(grid, chunks, block_size))
    tiled = rows.reshape(-1, TILE_ROWS, *rows.shape[1:]).transpose(0, 2, 1, 3, 4)
    return xp.ascontiguousarray(tiled)


def spread(values: Array, chunks: int, block_size: int) -> Array:
    """What blocks have (..., blocks, 2) as pairs have it (..., chunks, pairs, 2), filled up with 0."""
    rows, pairs = values.shape[:-2], pairs_of(block_size)
    filled = xp.zeros((*rows, chunks * pairs, 2), values.dtype)
    repeated = xp.repeat(values, max(1, block_size // CHUNK), axis=-2)[..., : chunks * pairs, :]
    filled[..., : repeated.shape[-2], :] = repeated
    return filled.reshape(*rows, chunks, pairs, 2)


def fill_rows(rows: Array) -> Array:
    """Rows (n, ...) with zeros after them, up to a whole tile."""
    filled = xp.zeros((-(-rows.shape[0] // TILE_ROWS) * TILE_ROWS, *rows.shape[1:]), rows.dtype)
    filled[: rows.shape[0]] = rows
    return filled


def device_array(name: str, array: Any, dtypes: tuple[str, ...], ndim: int, alignment: int = 1) -> None:
    """Refuse what a kernel cannot read as it is."""
    if not isinstance(array, xp.ndarray):
        raise TypeError(f"{name} must be an array of {xp.__name__}, got {type(array).__name__}")
    if array.dtype.name not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(dtypes)}, got {array.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {array.shape}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous in C order, got strides {array.strides}")
    # What other libraries hand over may start anywhere, and no kernel could say so.
    if not STANDIN and array.data.ptr % max(alignment, array.dtype.itemsize):
        raise ValueError(f"{name} must begin at a multiple of {max(alignment, array.dtype.itemsize)} bytes")


def same_device(name: str, array: Array, words: Array) -> None:
    """Refuse an array on another device, and any that is not on the current one."""
    if array.device != words.device:
        raise ValueError(f"{name} is on device {array.device}, words are on {words.device}")
    if not STANDIN and array.device != xp.cuda.Device():
        raise ValueError(f"{name} is on device {array.device}, the current one is {xp.cuda.Device()}")
