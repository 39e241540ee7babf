"""The packed layout: how kernels read ternary matrices from the memory of a device.

It is made from a checkpoint's tensors (`reference.packing`) once, when a model is loaded. A matrix has n
rows and m columns, the columns in quantization order. Rows are cut into tiles of 32, columns into chunks of
256, and the last ones are filled up. Below, i is a row and j a column of T; all numbers are little-endian.

::

                   chunk 0        chunk 1
               columns 0 ... 255  256 ... 511    ...
                    +--------------+--------------+--
     0 ... 31       | record 0     | record 1     |       tile 0
    rows            +--------------+--------------+--
    32 ... 63       | chunks       | chunks + 1   |       tile 1
                    +--------------+--------------+--

``words``  (tiles, chunks, 32, 16) uint32: the trits. A row of a chunk is 16 words, 64 bytes; a tile's rows
follow each other, so a record is 2 KiB. Word w holds the columns 16w to 16w + 15 of its chunk. Four lanes of
a warp share a row, and lane t loads 16 bytes at once, so word w = 4r + t is stored at the place 4t + r::

    byte     0   4   8  12   16  20  24  28   32  36  40  44   48  52  56  60
           +---------------+---------------+---------------+---------------+
    word   | 0   4   8  12 | 1   5   9  13 | 2   6  10  14 | 3   7  11  15 |
           +---------------+---------------+---------------+---------------+
    lane           0               1               2               3

The r-th words of the four lanes are a span: the columns 64r to 64r + 63 of the chunk, all of one block.
Within a word trit i has the digit t + 1, in {0, 1, 2}, in its bits 2i and 2i + 1::

    bit    31 30   29 28          7 6     5 4     3 2     1 0
           trit 15 trit 14  ...  trit 3  trit 2  trit 1  trit 0

So the digit of T[i, j] has the value 4^(j % 16) in
``words[i // 32, j // 256, i % 32, 4 * (j // 16 % 4) + j % 256 // 64]``. Rows and columns that fill up have
t = 0, the digit 1.

``grid``  (tiles, chunks, 32, pairs, 2) float16, or int8 codes of a `reference.types.CodedGrid`: alpha and
mu, in this order, for blocks of k = 64, 128, 256, 512, ... columns. A row of a chunk has 4, 2, 1, 1, ...
pairs: one for each block that begins in the chunk, or that of the block which the chunk is a part of::

    columns of the chunk    0 ... 63     64 ... 127   128 ... 191  192 ... 255
    k = 64                | alpha, mu  | alpha, mu  | alpha, mu  | alpha, mu  |   16 bytes, or 8 of codes
    k = 128               | alpha, mu               | alpha, mu               |    8           4
    k = 256, 512, ...     | alpha, mu                                         |    4           2

The pair of T[i, j] is ``grid[i // 32, j // 256, i % 32, j % 256 // k]``. What fills up is 0. For other
blocks, and for alpha and mu of other types, the grid is plain: (32 tiles, ceil(m / k), 2) float32 or
float64. Fast kernels do not read it.

``permutation``  (parts, 256 chunks) uint16, or uint32 if m > 65536: the original column of every column of T,
filled up with 0.

``row_factors``  (32 tiles,) float16 and ``block_factors`` (parts, chunks, pairs, 2) float16, only beside
codes: the factors of rows, and those of blocks for alpha and for mu, placed like the pairs of a row. What
fills up is 0.

Matrices that multiply the same x can be joined: up to three parts, whose tiles follow each other. Each part
begins with a tile of its own, and has its own rows of ``permutation`` and ``block_factors``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reference import checks
from reference.packing import unpack_base3
from reference.types import CodedGrid, TernaryMatrix

# Columns of a word, of a span (a word of each of the four lanes that share a row), and of a chunk.
WORD = 16
SPAN = 4 * WORD
CHUNK = 4 * SPAN

# Words of a row of a chunk.
WORDS = CHUNK // WORD

# Rows of a tile.
TILE_ROWS = 32

# Most matrices that can be joined.
PARTS = 3

# Smallest block whose alpha and mu can be stored chunk by chunk: a span must lie in one block.
LEAST_BLOCK = SPAN

Numbers = NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """A ternary matrix in the packed layout, or several that multiply the same x, its parts.

    Attributes
    ----------
    words, grid, permutation, row_factors, block_factors : ndarray
        The arrays of this module's docstring; factors are None without codes.
    ends : tuple of int
        Rows of y up to which every part reaches; the last is n.
    columns : int
        m.
    block_size : int
        Columns in a block (k); the last may have fewer.
    in_float16 : bool
        Whether |alpha| + |mu| of every block is within float16, so that every weight is.
    """

    words: Any
    grid: Any
    permutation: Any
    ends: tuple[int, ...]
    columns: int
    block_size: int
    row_factors: Any
    block_factors: Any
    in_float16: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        return self.ends[-1], self.columns

    def tiles_of_parts(self) -> list[tuple[int, int]]:
        """The first tile of every part, and the one after its last."""
        found, first, begin = [], 0, 0
        for end in self.ends:
            last = first + -(-(end - begin) // TILE_ROWS)
            found.append((first, last))
            first, begin = last, end
        return found

    def part(self, index: int) -> TernaryMatrix:
        """Read one of the matrices back, bit for bit.

        Parameters
        ----------
        index : int
            Which part.

        Returns
        -------
        TernaryMatrix
            alpha and mu have the type they are stored in.
        """
        n, m, k = self.ends[index] - (0, *self.ends)[index], self.columns, self.block_size
        first = TILE_ROWS * self.tiles_of_parts()[index][0]
        rows = slice(first, first + n)

        tiles, chunks = self.words.shape[:2]
        # (tiles, 32, chunks, r, t): back from place 4t + r to word 4r + t.
        words = self.words.reshape(tiles, chunks, TILE_ROWS, SPAN // WORD, CHUNK // SPAN)
        words = words.transpose(0, 2, 1, 4, 3)
        digits = np.stack([words >> np.uint32(2 * i) & np.uint32(3) for i in range(WORD)], axis=-1)
        T = digits.reshape(TILE_ROWS * tiles, CHUNK * chunks)[rows, :m].astype(np.int8) - np.int8(1)

        def of_blocks(placed: Any) -> Any:
            """(..., chunks, pairs, 2) to (..., blocks, 2)."""
            chunks, pairs = placed.shape[-3:-1]
            in_order = placed.reshape(*placed.shape[:-3], chunks * pairs, 2)
            return in_order[..., :: max(1, k // CHUNK), :][..., : -(-m // k), :]

        grid = self.grid if self.grid.ndim == 3 else np.concatenate(of_blocks(self.grid.swapaxes(1, 2)))
        values = grid[rows]
        scale, shift = values[..., 0], values[..., 1]
        if self.row_factors is not None:
            row, factors = self.row_factors[rows, None], of_blocks(self.block_factors[index])[None]
            scale, shift = (CodedGrid(values[..., i], row, factors[..., i]) for i in range(2))
        return TernaryMatrix(T, scale, shift, self.permutation[index, :m].astype(np.intp), k)


def lay_words(trits: ArrayLike) -> NDArray[np.uint32]:
    """Trits of one part, as ``words``.

    Parameters
    ----------
    trits : (n, m) array_like
        -1, 0 and +1, columns in quantization order.

    Returns
    -------
    (tiles, chunks, 32, 16) uint32

    Raises
    ------
    ValueError
        If `trits` is not a matrix, is empty, or holds other values.

    Examples
    --------
    >>> hex(lay_words([[1, 0, -1]])[0, 0, 0, 0])
    '0x55555546'
    """
    n, m = checks.matrix(trits, "trits").shape
    T = checks.trits(trits, (n, m), "trits")
    digits = np.pad(T + 1, ((0, -n % TILE_ROWS), (0, -m % CHUNK)), constant_values=1)
    tiles, chunks = digits.shape[0] // TILE_ROWS, digits.shape[1] // CHUNK
    digits = digits.reshape(tiles, TILE_ROWS, chunks, CHUNK // SPAN, SPAN // WORD, WORD)
    words = (digits * 4 ** np.arange(WORD)).sum(axis=-1, dtype=np.uint32)  # (tiles, 32, chunks, r, t)
    return words.transpose(0, 2, 1, 4, 3).reshape(tiles, chunks, TILE_ROWS, WORDS)


def lay_grid(grid: ArrayLike, columns: int, block_size: int) -> Numbers:
    """alpha and mu of one part, as a ``grid`` that is not plain.

    Parameters
    ----------
    grid : (n, ceil(columns / block_size), 2) array_like of float16 or int8
        alpha and mu of every block, or their codes.
    columns : int
        Columns of the matrix (m).
    block_size : int
        Columns in a block (k): 64, 128, 256, 512, ...

    Returns
    -------
    (tiles, chunks, 32, pairs, 2) array of the type of `grid`

    Raises
    ------
    ValueError
        If `grid` has another shape or type, or there is no such layout for `block_size`.
    """
    values = np.asarray(grid)
    if values.dtype not in (np.float16, np.int8):
        raise ValueError(f"grid must be float16 or int8, got {values.dtype}")
    if not _can_be_tiled(block_size):
        raise ValueError(f"block_size must be {LEAST_BLOCK} times a power of 2, got {block_size}")
    checks.same_shape("grid", values, (*values.shape[:1], -(-columns // block_size), 2))
    rows = _fill_rows(_by_chunk(values, columns, block_size))  # (32 tiles, chunks, pairs, 2)
    tiled = rows.reshape(len(rows) // TILE_ROWS, TILE_ROWS, *rows.shape[1:])
    return np.ascontiguousarray(tiled.swapaxes(1, 2))


def lay_out(
    packed: ArrayLike,
    scale: ArrayLike | CodedGrid,
    shift: ArrayLike | CodedGrid,
    permutation: ArrayLike,
    block_size: int,
) -> Layout:
    """Rearrange a matrix of a checkpoint for the kernels.

    Parameters
    ----------
    packed : (n, ceil(m / 5)) array_like of uint8
        Trits as `reference.packing.pack_base3` makes them.
    scale, shift : (n, ceil(m / block_size)) array_like, or CodedGrid
        alpha and mu of every block. Two CodedGrids share their factors of rows. Fast kernels read float16
        and codes.
    permutation : (m,) array_like of int
        Original column of every trit.
    block_size : int
        Columns in a block; the last may have fewer. Only 64, 128, 256, 512, ... have fast kernels.

    Returns
    -------
    Layout
        Of one part.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, a byte is not the code of trits, `permutation` does
        not hold every column once, factors are not float16 or not shared, or block_size is not positive.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    order = np.asarray(permutation)
    m = order.size
    if m == 0 or not np.array_equal(np.sort(order), np.arange(m)):
        raise ValueError(f"permutation must hold every index from 0 to {max(m - 1, 0)} once")
    words = lay_words(T := unpack_base3(packed, m))
    columns = np.zeros((1, words.shape[1] * CHUNK), np.uint16 if m <= 2**16 else np.uint32)
    columns[0, :m] = order
    n = T.shape[0]
    alpha, mu = (
        grid.decode() if isinstance(grid, CodedGrid) else np.asarray(grid) for grid in (scale, shift)
    )
    magnitudes = []
    for name, value in (("scale", alpha), ("shift", mu)):
        checks.same_shape(name, value, (n, -(-m // block_size)))
        magnitudes.append(np.abs(checks.matrix(value, name)))
    kinds = {alpha.dtype, mu.dtype}
    row_factors = block_factors = None
    if isinstance(scale, CodedGrid) and isinstance(shift, CodedGrid) and _can_be_tiled(block_size):
        _check_factors(scale, shift)
        grid = lay_grid(np.stack([scale.codes, shift.codes], axis=-1), m, block_size)
        row_factors = _fill_rows(scale.row[:, 0])
        block_factors = _by_chunk(np.stack([scale.block, shift.block], axis=-1), m, block_size)
    elif kinds == {np.dtype(np.float16)} and _can_be_tiled(block_size):
        grid = lay_grid(np.stack([alpha, mu], axis=-1), m, block_size)
    else:
        wide = np.float32 if kinds <= {np.dtype(np.float16), np.dtype(np.float32)} else np.float64
        grid = _fill_rows(np.stack([alpha, mu], axis=-1).astype(wide))
    # |alpha| + |mu| is the largest magnitude of alpha t + mu.
    in_float16 = bool(np.add(*magnitudes).max() <= np.finfo(np.float16).max)
    return Layout(words, grid, columns, (n,), m, block_size, row_factors, block_factors, in_float16)


def join(layouts: Sequence[Layout]) -> Layout:
    """Matrices that multiply the same x, as one layout.

    Parameters
    ----------
    layouts : sequence of Layout
        At most three parts in all, of the same columns, block size, and type of grid.

    Returns
    -------
    Layout
        The parts of all, in this order.

    Raises
    ------
    ValueError
        If they do not fit together.
    """
    kinds = {(layout.columns, layout.block_size, layout.grid.dtype.name) for layout in layouts}
    parts = sum(len(layout.ends) for layout in layouts)
    if len(kinds) != 1 or parts > PARTS:
        raise ValueError(
            f"1 to {PARTS} matrices with the same columns, block size and type of grid can be joined, "
            f"got {parts} with {sorted(kinds)}"
        )
    ends: list[int] = []
    for layout in layouts:
        begin = ends[-1] if ends else 0
        ends += [begin + end for end in layout.ends]
    names = ["words", "grid", "permutation"]
    if layouts[0].row_factors is not None:
        names += ["row_factors", "block_factors"]
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(layout, name) for layout in layouts]) for name in names
    }
    in_float16 = all(layout.in_float16 for layout in layouts)
    return replace(layouts[0], ends=tuple(ends), in_float16=in_float16, **joined)


def _check_factors(scale: CodedGrid, shift: CodedGrid) -> None:
    """Refuse factors that the layout has no place for."""
    n, blocks = scale.codes.shape
    for name, grid in (("scale", scale), ("shift", shift)):
        for kind, shape in (("row", (n, 1)), ("block", (1, blocks))):
            factors = getattr(grid, kind)
            checks.same_shape(f"{name}.{kind}", factors, shape)
            if factors.dtype != np.float16:
                raise ValueError(f"{name}.{kind} must be float16, got {factors.dtype}")
    if not np.array_equal(scale.row, shift.row):
        raise ValueError("scale and shift must have the same factors of rows")


def _can_be_tiled(block_size: int) -> bool:
    """Whether blocks are 64, 128, 256, 512, ... columns."""
    return block_size >= LEAST_BLOCK and block_size.bit_count() == 1


def _by_chunk(values: Numbers, columns: int, block_size: int) -> Numbers:
    """Pairs of blocks (..., blocks, 2) in their places (..., chunks, pairs, 2)."""
    pairs = max(1, CHUNK // block_size)
    placed = np.zeros((*values.shape[:-2], -(-columns // CHUNK), pairs, 2), dtype=values.dtype)
    for j in range(0, columns, min(CHUNK, block_size)):
        placed[..., j // CHUNK, j % CHUNK // block_size, :] = values[..., j // block_size, :]
    return placed


def _fill_rows(rows: Numbers) -> Numbers:
    """Rows (n, ...) with zeros below them, up to a whole tile."""
    filled = np.zeros((-(-len(rows) // TILE_ROWS) * TILE_ROWS, *rows.shape[1:]), dtype=rows.dtype)
    filled[: len(rows)] = rows
    return filled
