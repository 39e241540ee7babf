"""The product with packed trits on a CPU: one table lookup and one addition for five weights.

A byte holds five trits, the digits of its value in base 3. For five entries of x there are 243 sums
``sum(t_i x_i)``; a table has them all, and a row of weights picks one by its byte. The columns are cut into
pieces of at most 65 in one block, so that the tables of a piece (13 of them) stay in the fastest caches while
all rows pick from them.

Many tokens take the same path with `lanes.LANES` numbers in every entry of a table. Each number is computed
by the same operations in the same order, so the product of a token does not depend on the tokens beside it,
nor on how many threads share the rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from harness.cpu.compiled import compiled
from harness.cpu.lanes import add, load, number, scaled, store, subtract, word, zero

# Trits of a byte, and their sums.
TRITS = 5
SUMS = 3**TRITS
# Sums of the first three and of the last two trits of a byte; every sum of five is one of each.
LOW, HIGH = 27, 9
# Columns of a piece: 13 bytes without any padding.
PIECE = 13 * TRITS

_compiled = compiled()


class Pieces(NamedTuple):
    """How columns are cut: the place of every piece, as arrays of one length.

    Attributes
    ----------
    first, width : int64 arrays
        First column, and number of columns.
    block : int64 array
        Block of the columns.
    start : int64 array
        Where the bytes of the piece begin for one row; times the rows, for all of them.
    """

    first: Any
    width: Any
    block: Any
    start: Any

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row of weights."""
        return int(self.start[-1]) + -(-int(self.width[-1]) // TRITS)


def cut(columns: int, block_size: int) -> Pieces:
    """Cut the columns of every block into pieces."""
    found = [
        (first, min(PIECE, block_size - first % block_size, columns - first))
        for begin in range(0, columns, block_size)
        for first in range(begin, min(begin + block_size, columns), PIECE)
    ]
    first, width = np.array(found, np.int64).T
    groups = -(-width // TRITS)
    return Pieces(first, width, first // block_size, np.cumsum(groups) - groups)


class Weights(NamedTuple):
    """Packed matrices that multiply the same x; n is the sum of their rows.

    Attributes
    ----------
    codes : uint8 array
        For every piece and row, the bytes of its trits; and `lanes.word`'s eight more.
    grid : (blocks, n, 1 or 2) int8 or uint16 array
        alpha, and mu unless it is 0: codes, or the bits of float16.
    row_factors : (n,) uint16 array
        Bits of float16: what the numbers of a row are to be multiplied by. Empty for 1.
    block_factors : (matrices, blocks, 1 or 2) uint16 array
        The same for alpha and mu of a block.
    ends : (matrices,) int64 array
        End row of every matrix.
    pieces : Pieces
        How the columns are cut.
    """

    codes: Any
    grid: Any
    row_factors: Any
    block_factors: Any
    ends: Any
    pieces: Pieces


def multiply(x: Any, weights: Weights, y: Any, begin: int, end: int) -> None:
    """Multiply tokens by some rows of weights. Arrays are in C order.

    Parameters
    ----------
    x : (bundles, m) or (bundles, m, LANES) float32 array
        One token, or `lanes.LANES` tokens, in a bundle; columns in the order of the trits.
    weights : Weights
        The matrices.
    y : (bundles, n) or (bundles, n, LANES) float32 array
        Receives the products.
    begin, end : int
        The rows to compute.
    """
    lanes = x.shape[2:]
    scratch = (np.empty((size, *lanes), np.float32) for size in (PIECE // TRITS * SUMS, LOW, HIGH))
    _multiply(x.reshape(-1, *lanes), weights, y.reshape(-1, *lanes), *scratch, begin, end)


@_compiled
def _multiply(x: Any, weights: Any, y: Any, tables: Any, low: Any, high: Any, begin: int, end: int) -> None:
    codes, pieces = weights.codes, weights.pieces
    rows, shifted = weights.grid.shape[1], weights.grid.shape[2] == 2
    bundles = len(y) // rows
    columns = len(x) // bundles
    coded = len(weights.row_factors) > 0
    for bundle in range(bundles):
        for i in range(begin, end):
            store(y, bundle * rows + i, zero(y))
    for piece in range(len(pieces.first)):
        width, block = pieces.width[piece], pieces.block[piece]
        groups = (width + TRITS - 1) // TRITS
        start, pairs = pieces.start[piece] * rows, weights.grid[block]
        for bundle in range(bundles):
            total = _tabulate(tables, low, high, x, bundle * columns + pieces.first[piece], width)
            here = bundle * rows
            matrix_begin = 0
            for matrix in range(len(weights.ends)):
                matrix_end = weights.ends[matrix]
                of_alpha, of_mu = np.float32(1), total
                if coded:
                    of_alpha = number(weights.block_factors[matrix, block, 0])
                if coded and shifted:
                    of_mu = scaled(total, number(weights.block_factors[matrix, block, 1]))
                for i in range(max(begin, matrix_begin), min(end, matrix_end)):
                    at = start + i * groups
                    if groups == 13:  # unrolled, with few loads: nearly twice as fast
                        picked = _pick(tables, 0, 8, word(codes, at), zero(tables))
                        picked = _pick(tables, 8, 5, word(codes, at + 8), picked)
                    else:
                        picked = zero(tables)
                        for g in range(groups):
                            picked = _pick(tables, g, 1, word(codes, at + g), picked)
                    change = scaled(scaled(picked, of_alpha), number(pairs[i, 0]))
                    if shifted:
                        change = add(change, scaled(of_mu, number(pairs[i, 1])))
                    store(y, here + i, add(load(y, here + i), change))
                matrix_begin = matrix_end
    if coded:
        for bundle in range(bundles):
            for i in range(begin, end):
                factor = number(weights.row_factors[i])
                store(y, bundle * rows + i, scaled(load(y, bundle * rows + i), factor))


@_compiled
def _tabulate(tables: Any, low: Any, high: Any, x: Any, first: int, width: int) -> Any:
    """Fill the tables of a piece; return the sum of its entries of x."""
    total = zero(x)
    for j in range(first, first + width):
        total = add(total, load(x, j))
    for done in range(0, width, TRITS):
        _fill(low, 3, x, first + done, width - done)
        _fill(high, 2, x, first + done + 3, width - done - 3)
        for h in range(HIGH):
            at, more = done // TRITS * SUMS + h * LOW, load(high, h)
            for q in range(LOW):
                store(tables, at + q, add(load(low, q), more))
    return total


@_compiled
def _fill(sums: Any, trits: int, x: Any, first: int, width: int) -> None:
    """Sum some entries of x with all trits; entries beyond the width are 0."""
    store(sums, 0, zero(sums))
    size = 1
    for i in range(trits):
        value = load(x, first + i) if i < width else zero(x)
        for q in range(size):
            before = load(sums, q)
            store(sums, size + q, before)
            store(sums, 2 * size + q, add(before, value))
            store(sums, q, subtract(before, value))
        size *= 3


@_compiled
def _pick(tables: Any, first: int, count: int, eight: Any, picked: Any) -> Any:
    """Add the sums that some bytes of a word name, each from its own table."""
    for g in range(count):
        picked = add(picked, load(tables, (first + g) * SUMS + np.intp(eight & np.uint64(0xFF))))
        eight >>= np.uint64(8)
    return picked
