"""The product with a packed ternary matrix in plain Numba: for any type of x, any block and any device.

It defines what the fast kernels of `decode.cu` and `prefill.cu` compute, and stands in for them. One
output, of a token and a row, for every CUDA block; sums are float64. The layout of the words is in
`gpu.matmul.Packed`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, float64, njit

from gpu.device import STANDIN, Array, stream, xp
from gpu.kernels.lanes import CPU, CUDA, LANES, Target

# Columns of a word, and of a chunk: four lanes of a warp, with four words each.
WORD = 16
CHUNK = 256

# CUDA's limit for the second dimension of a grid.
MOST_TOKENS = 65535


def _build(target: Target) -> Any:
    """The body for one output."""
    total = target.total

    @target.jit
    def multiply_row(x, words, grid, permutation, block_size, y, token, row, partial, lane, lanes):
        m = permutation.shape[0]
        result = 0.0
        for block in range(grid.shape[1]):
            matched = 0.0
            everything = 0.0
            for j in range(block * block_size + lane, min((block + 1) * block_size, m), lanes):
                # Word 4r + t of a chunk is stored at 4t + r, so that a lane t loads four r at once.
                place = j % CHUNK // WORD
                place = j // CHUNK * (CHUNK // WORD) + place % 4 * 4 + place // 4
                t = np.int64((words[row, place] >> np.uint32(2 * (j % WORD))) & np.uint32(3)) - 1
                value = np.float64(x[token, permutation[j]])
                matched += t * value
                everything += value
            # Linear in the sums, so that lanes need not be added up block by block.
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
    """One output a CUDA block; see `multiply` for the arguments."""
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


def multiply(
    x: Array, words: Array, grid: Array, permutation: Array, block_size: int, simulate: bool = False
) -> Array:
    """``y = x (αT + μ)ᵀ`` in float64.

    Parameters
    ----------
    x : (tokens, m) float32 or float64
        Activations, columns in the original order.
    words : (n, 16 ceil(m / 256)) uint32
        Trits, as in `gpu.matmul.Packed`.
    grid : (n, blocks, 2) float32 or float64
        alpha and mu of every block.
    permutation : (m,) uint32
        Original column of every trit.
    block_size : int
        Columns in a block.
    simulate : bool
        In the stand-in, run the CUDA kernel in Numba's simulator instead of its body on the CPU.

    Returns
    -------
    y : (tokens, n) float64
    """
    y = xp.empty((x.shape[0], words.shape[0]))
    for first in range(0, x.shape[0], MOST_TOKENS):
        part = slice(first, first + MOST_TOKENS)
        arguments = (x[part], words, grid, permutation, block_size, y[part])
        if STANDIN and not simulate:
            _multiply_cpu(*arguments, xp.empty(1))
        else:
            multiply_kernel[y[part].shape[::-1], LANES, stream()](*arguments)
    return y
