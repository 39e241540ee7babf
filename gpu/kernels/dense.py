"""Launcher of dense.cu: dense weights for the product of a library."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu.device import Array, xp
from gpu.kernels.layout import Layout
from gpu.kernels.parameters import ACTIVATIONS, MATRIX, Int, Struct, matrix
from gpu.kernels.sources import ROWS, VARIANTS, Launch, Limits, Source, launch, variant
from reference.layout import TILE_ROWS

THREADS = 256
# A row pair is rows g and g + 8 of 16. A CUDA block takes at most all of 16 rows.
ROW_PAIRS = ROWS // 2

PARAMETERS = Struct(
    "DenseParameters",
    matrix=MATRIX,
    weights=ACTIVATIONS,
    width=Int(),
    stride=Int(),
    row_pairs=Int(),
    part=Int(),
    first_tile=Int(),
)

SOURCE = Source(
    "dense.cu",
    {"THREADS": THREADS, "ROW_PAIRS": ROW_PAIRS},
    [PARAMETERS],
    {f"dense_{kind}": f"DENSE(dense_{kind}, {c_types})" for kind, c_types in VARIANTS.items()},
)


def unpack(layout: Layout, part: int, dtype: Any, device: Limits, launch: Launch = launch) -> Array:
    """Dense weights of a part, columns in the original order.

    Parameters
    ----------
    layout : Layout
        The matrix, or the matrices.
    part : int
        Which of them.
    dtype : dtype
        A type in `gpu.kernels.parameters.TYPES`, to which weights are rounded.
    device : Limits
        Where it runs; `row_pairs_at_once` must not be 0.
    launch : callable
        Runs a kernel; tests run kernels on the CPU.

    Returns
    -------
    (rows, m) array
        Every row begins at a multiple of 16 bytes, because libraries are faster then.
    """
    m = layout.columns
    first_tile, last_tile = layout.tiles_of_parts()[part]
    width, stride = -(-m // 8) * 8, _stride(m)
    weights = xp.empty(((last_tile - first_tile) * TILE_ROWS, width), dtype)
    row_pairs = row_pairs_at_once(m, device.shared)
    arguments = PARAMETERS.of(
        matrix=matrix(layout),
        weights=weights,
        width=width,
        stride=stride,
        row_pairs=row_pairs,
        part=part,
        first_tile=first_tile,
    )
    grid = ((last_tile - first_tile) * (TILE_ROWS // 2 // row_pairs),)
    kernel = f"dense_{variant(np.dtype(dtype), layout)}"
    launch(SOURCE, kernel, grid, THREADS, row_pairs * stride * 4, arguments)
    return weights[: layout.ends[part] - (layout.ends[part - 1] if part else 0), :m]


def row_pairs_at_once(m: int, shared: int) -> int:
    """How many row pairs a CUDA block takes: 8, 4, 2 or 1, or 0 if not even one fits.

    As many as leave room for three blocks on an SM, so that one block writes while another reads.
    """
    stride = 4 * _stride(m)
    for row_pairs in (ROW_PAIRS, ROW_PAIRS // 2, ROW_PAIRS // 4):
        if 3 * row_pairs * stride <= shared:
            return row_pairs
    return int(stride <= shared)


def _stride(m: int) -> int:
    """Words of shared memory from one row pair to the next, so that their first words are in other banks."""
    return -(-m // 8) * 8 + 4
