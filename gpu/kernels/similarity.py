"""Choose the columns most similar to the mean column, Eq. 16, without a temporary of the matrix's size.

Row sums: the lanes of a CUDA block share a row. Column sums: each thread sums one column over a slab of rows,
and adjacent threads take adjacent columns, so that the loads of a warp coalesce. Slabs are added in order.
All columns go through the same operations, so columns that are equal, or multiples by a power of two, get the
same bits, and tie.

Choice: the rank of a column is the number of columns that precede it. Counting them is quadratic, but takes
two launches; sorting, and restoring the order of indices, takes dozens. Each thread compares its column with
only `RIVALS` others, because one warp alone on an SM cannot hide the latency of its loop. Counts are
integers, so the order of their addition does not matter.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda, float64, int64, njit

from gpu.device import STANDIN, Array, xp
from gpu.kernels.lanes import CPU, CUDA, LANES, Target
from gpu.kernels.launching import launch

# Rows per slab; one thread sums one column of a slab.
SLAB = 128

# Number of columns that a thread compares its column with.
RIVALS = 256


def _build(target: Target) -> tuple[Any, ...]:
    jit, barrier, total = target.jit, target.barrier, target.total

    @jit
    def add_row(W, row_sums, row, partial, lane, lanes):
        weights = 0.0
        for column in range(lane, W.shape[1], lanes):
            weights += np.float64(W[row, column])
        weights = total(partial, lane, lanes, weights)
        if lane == 0:
            row_sums[row] = weights

    @jit
    def add_squares(W, sums, slab, column):
        first = slab * SLAB
        squares = 0.0
        nonzero = 0.0
        for row in range(first, min(first + SLAB, W.shape[0])):
            weight = np.float64(W[row, column])
            squares += weight * weight
            if weight != 0.0:
                nonzero = 1.0
        sums[0, slab, column] = squares
        sums[1, slab, column] = nonzero

    @jit
    def add_products(W, row_sums, sums, slab, column):
        squares = 0.0
        for other in range(sums.shape[1]):
            squares += sums[0, other, column]
        norm = math.sqrt(squares)
        if norm == 0.0:  # zeros, or weights whose squares underflow
            norm = 1.0
        first = slab * SLAB
        products = 0.0
        for row in range(first, min(first + SLAB, W.shape[0])):
            # Divide each element: then columns of a single row are exactly 1 or -1, and tie.
            products += np.float64(W[row, column]) / norm * row_sums[row]
        sums[2, slab, column] = products

    @jit
    def compare(sums, remaining, similarity, column):
        nonzero = 0.0
        value = 0.0
        for slab in range(sums.shape[1]):
            nonzero += sums[1, slab, column]
            value += sums[2, slab, column]
        # Comparisons with NaN are false, so similarities of remaining columns must not be NaN.
        if not remaining[column]:
            value = np.nan
        elif nonzero == 0.0 or value != value:
            value = -np.inf
        similarity[column] = value

    @jit
    def count_ahead(similarity, column, first, last):
        value = similarity[column]
        if value != value:  # a finished column comes after all others
            return np.int32(last - first)
        ahead = np.int32(0)
        # 32-bit counters take half as many instructions as 64-bit ones.
        other, end = np.uint32(first), np.uint32(last)
        while other < end:
            rival = similarity[other]
            if rival > value or (rival == value and other < column):
                ahead = np.int32(ahead + 1)
            other = np.uint32(other + 1)
        return ahead

    @jit
    def collect(ranks, indices, partial, lane, lanes):
        # Each lane takes adjacent columns, so that the indices ascend.
        m = ranks.shape[0]
        share = (m + lanes - 1) // lanes
        first = lane * share
        last = min(first + share, m)
        found = 0
        for column in range(first, last):
            if ranks[column] < indices.shape[0]:
                found += 1
        partial[lane] = found
        barrier()
        place = 0
        for other in range(lane):
            place += partial[other]
        for column in range(first, last):
            if ranks[column] < indices.shape[0]:
                indices[place] = column
                place += 1

    return add_row, add_squares, add_products, compare, count_ahead, collect


if CPU is not None:
    _add_row_cpu, _add_squares_cpu, _add_products_cpu, _compare_cpu, _count_cpu, _collect_cpu = _build(CPU)

    @njit
    def _compare_columns_cpu(W, remaining, row_sums, sums, similarity, partial):
        for row in range(W.shape[0]):
            _add_row_cpu(W, row_sums, row, partial, 0, 1)
        for slab in range(sums.shape[1]):
            for column in range(W.shape[1]):
                _add_squares_cpu(W, sums, slab, column)
        for slab in range(sums.shape[1]):
            for column in range(W.shape[1]):
                _add_products_cpu(W, row_sums, sums, slab, column)
        for column in range(W.shape[1]):
            _compare_cpu(sums, remaining, similarity, column)

    @njit
    def _choose_columns_cpu(similarity, ranks, indices, partial):
        m = similarity.shape[0]
        for column in range(m):
            for first in range(0, m, RIVALS):
                ranks[column] += _count_cpu(similarity, column, first, min(first + RIVALS, m))
        _collect_cpu(ranks, indices, partial, 0, 1)


_add_row, _add_squares, _add_products, _compare, _count_ahead, _collect = _build(CUDA)


@cuda.jit
def add_rows_kernel(W, row_sums):
    """Compute the row sums (n,) of W (n, m); one row per CUDA block."""
    partial = cuda.shared.array(LANES, float64)
    _add_row(W, row_sums, cuda.blockIdx.x, partial, cuda.threadIdx.x, LANES)


@cuda.jit
def add_squares_kernel(W, sums):
    """Per slab and column: write the squared norm to sums[0], and whether any weight is not 0 to sums[1]."""
    column = cuda.blockIdx.x * LANES + cuda.threadIdx.x
    if column < W.shape[1]:
        _add_squares(W, sums, cuda.blockIdx.y, column)


@cuda.jit
def add_products_kernel(W, row_sums, sums):
    """Per slab: write the product of unit column and row sums to sums[2]; after `add_squares_kernel`."""
    column = cuda.blockIdx.x * LANES + cuda.threadIdx.x
    if column < W.shape[1]:
        _add_products(W, row_sums, sums, cuda.blockIdx.y, column)


@cuda.jit
def compare_kernel(sums, remaining, similarity):
    """Add the slabs to similarities (m,); one column per thread."""
    column = cuda.blockIdx.x * LANES + cuda.threadIdx.x
    if column < similarity.shape[0]:
        _compare(sums, remaining, similarity, column)


@cuda.jit
def rank_kernel(similarity, ranks):
    """Add to ranks (m,), initially zero, the number of columns that precede each; m for finished columns."""
    column = cuda.blockIdx.x * LANES + cuda.threadIdx.x
    first = cuda.blockIdx.y * RIVALS
    if column < similarity.shape[0]:
        last = min(first + RIVALS, similarity.shape[0])
        cuda.atomic.add(ranks, column, _count_ahead(similarity, column, first, last))


@cuda.jit
def collect_kernel(ranks, indices):
    """Collect the columns with a rank below the number of indices, ascending; in one CUDA block."""
    partial = cuda.shared.array(LANES, int64)
    _collect(ranks, indices, partial, cuda.threadIdx.x, LANES)


def compare_columns(W: Array, remaining: Array, simulate: bool = False) -> Array:
    """Compute the similarity of each remaining column to their mean (Eq. 16), up to a common factor.

    Parameters
    ----------
    W : (n, m) float32 or float64
        Weights; finished columns are zero.
    remaining : (m,) bool
        True for columns that are not finished.
    simulate : bool
        In the stand-in, run the CUDA kernels in Numba's simulator instead of their bodies on the CPU.

    Returns
    -------
    (m,) float64
        Product of the column, divided by its norm, and the row sums of W; -infinity for a column of zeros,
        NaN for a finished column.
    """
    n, m = W.shape
    W = xp.ascontiguousarray(W)
    row_sums, sums, similarity = xp.empty(n), xp.empty((3, -(-n // SLAB), m)), xp.empty(m)
    if STANDIN and not simulate:
        _compare_columns_cpu(W, remaining, row_sums, sums, similarity, xp.empty(1))
    else:
        groups = -(-m // LANES)
        launch(add_rows_kernel, n, W, row_sums)
        launch(add_squares_kernel, (groups, sums.shape[1]), W, sums)
        launch(add_products_kernel, (groups, sums.shape[1]), W, row_sums, sums)
        launch(compare_kernel, groups, sums, remaining, similarity)
    return similarity


def choose_columns(similarity: Array, k: int, simulate: bool = False) -> Array:
    """Choose the k columns with the highest similarity.

    Parameters
    ----------
    similarity : (m,) float64
        NaN for finished columns; at least k others are required.
    k : int
        Number of columns to choose.
    simulate : bool
        In the stand-in, run the CUDA kernels in Numba's simulator instead of their bodies on the CPU.

    Returns
    -------
    indices : (k,) int64
        Ascending. Ties go to the lower index.
    """
    m = similarity.shape[0]
    ranks, indices = xp.zeros(m, xp.int32), xp.empty(k, xp.int64)
    if STANDIN and not simulate:
        _choose_columns_cpu(similarity, ranks, indices, xp.empty(1, xp.int64))
    else:
        launch(rank_kernel, (-(-m // LANES), -(-m // RIVALS)), similarity, ranks)
        launch(collect_kernel, 1, ranks, indices)
    return indices
