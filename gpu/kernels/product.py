"""Multiply by a packed ternary matrix in plain Numba: for any type of x, any block size and any device.

This kernel defines the result of the kernels in CUDA C++, and replaces them where they do not apply
(`gpu.kernels.choice`). Each CUDA block computes one output, for one token and one row, with float64 sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, float64, njit

from gpu.device import STANDIN, Array, xp
from gpu.kernels.lanes import CPU, CUDA, LANES, Target
from gpu.kernels.launching import launch
from gpu.kernels.layout import Layout
from reference.layout import CHUNK, TILE_ROWS, WORD

# CUDA's limit on the second dimension of a grid.
MOST_TOKENS = 65535


def _build(target: Target) -> Any:
    """Build the kernel body for one output."""
    total = target.total

    @target.jit
    def multiply_row(x, words, grid, permutation, block_size, y, token, row, partial, lane, lanes):
        m = x.shape[1]
        result = 0.0
        for block in range(grid.shape[1]):
            matched = 0.0
            everything = 0.0
            for j in range(block * block_size + lane, min((block + 1) * block_size, m), lanes):
                # Word 4r + t of a chunk is stored at 4t + r, so that lane t loads r = 0 ... 3 at once.
                place = j % CHUNK // WORD
                word = words[row // TILE_ROWS, j // CHUNK, row % TILE_ROWS, place % 4 * 4 + place // 4]
                t = np.int64((word >> np.uint32(2 * (j % WORD))) & np.uint32(3)) - 1
                value = np.float64(x[token, permutation[j]])
                matched += t * value
                everything += value
            # Linear in the sums, so the lanes are added only once, not for every block.
            result += np.float64(grid[row, block, 0]) * matched + np.float64(grid[row, block, 1]) * everything
        result = total(partial, lane, lanes, result)
        if lane == 0:
            y[token, row] = result

    return multiply_row


if CPU is not None:
    _multiply_row_cpu = _build(CPU)

    @njit
    def _multiply_cpu(x, words, grid, permutation, block_size, y, partial):
        shared = x, words, grid, permutation, block_size, y
        for token in range(y.shape[0]):
            for row in range(y.shape[1]):
                _multiply_row_cpu(*shared, token, row, partial, 0, 1)


_multiply_row = _build(CUDA)


@cuda.jit
def multiply_kernel(x, words, grid, permutation, block_size, y):
    """One output per CUDA block; see `multiply` for the arguments."""
    partial = cuda.shared.array(LANES, float64)
    _multiply_row(
        x,
        words,
        grid,
        permutation,
        block_size,
        y,
        cuda.blockIdx.y,
        cuda.blockIdx.x,
        partial,
        cuda.threadIdx.x,
        LANES,
    )


def multiply(x: Array, layout: Layout, simulate: bool = False) -> Array:
    """Compute ``y = x (αT + μ)ᵀ`` in float64.

    Parameters
    ----------
    x : (tokens, m) float32 or float64
        Activations, with columns in the original order.
    layout : Layout
        The matrix, or several joined matrices.
    simulate : bool
        In the stand-in, run the CUDA kernel in Numba's simulator instead of its body on the CPU.

    Returns
    -------
    y : (tokens, n) float64
    """
    outputs = []
    begin = 0
    for part, (first_tile, last_tile) in enumerate(layout.tiles_of_parts()):
        y = xp.empty((x.shape[0], layout.ends[part] - begin))
        begin = layout.ends[part]
        matrix = (
            layout.words[first_tile:last_tile],
            layout.plain_grid(part),
            layout.permutation[part],
            layout.block_size,
        )
        for first in range(0, x.shape[0], MOST_TOKENS):
            some = slice(first, first + MOST_TOKENS)
            if STANDIN and not simulate:
                _multiply_cpu(x[some], *matrix, y[some], xp.empty(1))
            else:
                launch(multiply_kernel, y[some].shape[::-1], x[some], *matrix, y[some])
        outputs.append(y)
    return xp.concatenate(outputs, axis=1)
