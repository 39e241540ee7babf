"""Products of trits with something, summed over every block of columns; one row and block per CUDA block."""

from __future__ import annotations

from typing import Any

from numba import cuda, float64, njit

from gpu.device import STANDIN, Array, xp
from gpu.kernels.lanes import CPU, CUDA, LANES, Target
from gpu.kernels.launching import launch


def _build(target: Target) -> Any:
    """The body for one row and block."""
    total = target.total

    @target.jit
    def match_segment(P, T, first, block_size, sums, row, block, partial, lane, lanes):
        begin = block * block_size
        matched = 0.0
        for j in range(begin + lane, min(begin + block_size, P.shape[1]), lanes):
            matched += P[row, j] * T[row, first + j]
        matched = total(partial, lane, lanes, matched)
        if lane == 0:
            sums[row, block] = matched

    return match_segment


if CPU is not None:
    _match_segment_cpu = _build(CPU)

    @njit
    def _match_rows_cpu(P, T, first, block_size, sums, partial):
        for row in range(sums.shape[0]):
            for block in range(sums.shape[1]):
                _match_segment_cpu(P, T, first, block_size, sums, row, block, partial, 0, 1)


_match_segment = _build(CUDA)


@cuda.jit
def match_rows_kernel(P, T, first, block_size, sums):
    """One row and block of columns per CUDA block; see `match_rows` for the arguments."""
    partial = cuda.shared.array(LANES, float64)
    _match_segment(
        P, T, first, block_size, sums, cuda.blockIdx.x, cuda.blockIdx.y, partial, cuda.threadIdx.x, LANES
    )


def match_rows(P: Array, T: Array, first: int, block_size: int, simulate: bool = False) -> Array:
    """Multiply by trits, and sum over each block of columns, without a temporary of the matrix's size.

    Parameters
    ----------
    P : (n, r) float64
        Factors of the trits of columns `first` to ``first + r``.
    T : (n, m) int8
        Trits.
    first, block_size : int
        First column, at which a block begins, and columns of a block; the last may have fewer.
    simulate : bool
        In the stand-in, run the CUDA kernel in Numba's simulator instead of its body on the CPU.

    Returns
    -------
    (n, blocks) float64
    """
    n, r = P.shape
    sums = xp.empty((n, -(-r // block_size)))
    arguments = xp.ascontiguousarray(P), xp.ascontiguousarray(T), first, block_size, sums
    if STANDIN and not simulate:
        _match_rows_cpu(*arguments, xp.empty(1))
    else:
        launch(match_rows_kernel, sums.shape, *arguments)
    return sums
