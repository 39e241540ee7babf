"""Coordinate descent on the trits of whole rows, one row per CUDA block.

The lanes test as many columns at once as there are lanes. The first of them that would move does, and the
search goes on after it: columns move in the order of `reference.descent`. A row of H is read only for a move.

A panel of gradients is in shared memory and follows every move. The other gradients of the row follow once a
panel, for all its moves together: they are read and written once for some ten moves.

Bytes of global memory for a row of m columns: a sweep reads 17 m (gradients, diagonal of H, trits), a move
8 m (a row of H), and a panel in which something moved 16 m (the other gradients). Rows are at about the same
column at the same time, so the rows of H that they read are mostly in the L2 cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, float64, int64, njit

from gpu.device import STANDIN, Array, xp
from gpu.kernels.lanes import CPU, CUDA, LANES, Target
from gpu.kernels.launching import launch
from reference.descent import MARGIN

# Columns whose gradients follow every move. Wider panels make a move dearer, narrower ones save less.
PANEL = 128


def _build(target: Target) -> Any:
    """The body for one row."""
    jit, barrier, least = target.jit, target.barrier, target.least

    @jit
    def best_trit(t, g, step, curvature):
        # The trit with the least error, or t if that gains too little.
        cost = step * curvature
        if cost == 0.0:
            return t
        best = t + g / cost
        nearest = np.int8(0)  # `best` rounded half to even, and clamped
        if best > 0.5:
            nearest = np.int8(1)
        elif best < -0.5:
            nearest = np.int8(-1)
        d = step * (nearest - t)
        if d * (d * curvature - 2 * g) < -MARGIN * (step * step) * curvature:
            return nearest
        return t

    @jit
    def descend_panel(
        T, alpha, H, diagonal, block_size, row, first, last, panel, moved, by, nearest, changes, lane, lanes
    ):
        # Moves the trits of a panel; `moved` and `by` take the columns, and the changes of their weights.
        moves = 0
        start = first
        while start < last:
            j = start + lane
            mine = last
            if j < last:
                t = T[row, j]
                step = alpha[row, j // block_size]
                best = best_trit(t, panel[j - first], step, diagonal[j])
                if best != t:
                    mine = j
                    changes[lane] = step * (best - t)
            chosen = least(nearest, lane, lanes, mine)
            if chosen == last:
                start += lanes
                continue
            if mine == chosen:
                T[row, chosen] = best
            d = changes[chosen - start]
            for other in range(first + lane, last, lanes):
                panel[other - first] -= d * H[chosen, other]
            if lane == 0:
                moved[moves] = chosen
                by[moves] = d
            moves += 1
            start = chosen + 1
            barrier()
        return moves

    @jit
    def descend_row(
        T,
        g,
        alpha,
        H,
        diagonal,
        block_size,
        sweeps,
        moves,
        row,
        panel,
        moved,
        by,
        nearest,
        changes,
        lane,
        lanes,
    ):
        m = T.shape[1]
        everything = 0
        for _ in range(sweeps):
            before = everything
            for first in range(0, m, PANEL):
                last = min(first + PANEL, m)
                for j in range(first + lane, last, lanes):
                    panel[j - first] = g[row, j]  # for this lane alone, until the first `least`
                count = descend_panel(
                    T,
                    alpha,
                    H,
                    diagonal,
                    block_size,
                    row,
                    first,
                    last,
                    panel,
                    moved,
                    by,
                    nearest,
                    changes,
                    lane,
                    lanes,
                )
                if count == 0:
                    continue
                everything += count
                for j in range(lane, m, lanes):
                    if first <= j and j < last:
                        g[row, j] = panel[j - first]
                    else:
                        change = 0.0
                        for i in range(count):
                            change += by[i] * H[moved[i], j]
                        g[row, j] -= change
                barrier()
            if everything == before:
                break
        if lane == 0:
            moves[row] = everything

    return descend_row


if CPU is not None:
    _descend_row_cpu = _build(CPU)

    @njit
    def _descend_rows_cpu(
        T, g, alpha, H, diagonal, block_size, sweeps, moves, panel, moved, by, nearest, changes
    ):
        for row in range(T.shape[0]):
            _descend_row_cpu(
                T,
                g,
                alpha,
                H,
                diagonal,
                block_size,
                sweeps,
                moves,
                row,
                panel,
                moved,
                by,
                nearest,
                changes,
                0,
                1,
            )


_descend_row = _build(CUDA)


@cuda.jit
def descend_rows_kernel(T, g, alpha, H, diagonal, block_size, sweeps, moves):
    """One row per CUDA block; see `descend_rows` for the arguments."""
    # One a line: Numba's simulator tells shared arrays apart by their lines.
    panel = cuda.shared.array(PANEL, float64)
    moved = cuda.shared.array(PANEL, int64)
    by = cuda.shared.array(PANEL, float64)
    nearest = cuda.shared.array(LANES, int64)
    changes = cuda.shared.array(LANES, float64)
    _descend_row(
        T,
        g,
        alpha,
        H,
        diagonal,
        block_size,
        sweeps,
        moves,
        cuda.blockIdx.x,
        panel,
        moved,
        by,
        nearest,
        changes,
        cuda.threadIdx.x,
        LANES,
    )


def descend_rows(
    T: Array, g: Array, alpha: Array, H: Array, block_size: int, sweeps: int, simulate: bool = False
) -> Array:
    """Move the trits of every row in place, and its gradients with them.

    Parameters
    ----------
    T : (n, m) int8
        Trits, in C order.
    g : (n, m) float64
        (W - W_hat) H, in C order; at the end that of the moved trits.
    alpha : (n, blocks) float64
        Scales.
    H : (m, m) float64
        Damped Gram matrix.
    block_size, sweeps : int
        Columns in a block, and most passes over the columns.
    simulate : bool
        In the stand-in, run the CUDA kernel in Numba's simulator instead of its body on the CPU.

    Returns
    -------
    moves : (n,) int64
        Number of moves in each row.
    """
    moves = xp.zeros(T.shape[0], xp.int64)
    grid, H = xp.ascontiguousarray(alpha), xp.ascontiguousarray(H)
    arguments = (T, g, grid, H, xp.diagonal(H).copy(), block_size, sweeps, moves)
    if STANDIN and not simulate:
        panel, by, moved = xp.empty(PANEL), xp.empty(PANEL), xp.empty(PANEL, xp.int64)
        _descend_rows_cpu(*arguments, panel, moved, by, xp.empty(1, xp.int64), xp.empty(1))
    else:
        launch(descend_rows_kernel, T.shape[0], *arguments)
    return moves
