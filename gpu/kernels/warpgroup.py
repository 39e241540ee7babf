"""Launcher of warpgroup.cu: the product for many tokens on Hopper."""

from __future__ import annotations

import numpy as np

from gpu.device import Array, xp
from gpu.kernels.layout import Layout
from gpu.kernels.parameters import ACTIVATIONS, MATRIX, PERMUTATION, SUMS, TYPES, Int, Struct, matrix
from gpu.kernels.sources import ROWS, VARIANTS, WARP, Launch, Limits, Source, launch, variant
from reference.layout import CHUNK

# The compute capability with wgmma, and its target that no later device runs.
HOPPER, HOPPER_TARGET = 90, "sm_90a"

# Two warpgroups. A warp takes 16 rows.
WARPS = 8
THREADS, BLOCK_ROWS = WARPS * WARP, WARPS * ROWS
# Columns of B of one wgmma.
TOKENS = 128
# Chunks of x in shared memory: one for the products in flight, one for the next products, one prefetched.
STAGES = 3
SHARED = STAGES * CHUNK * TOKENS * 2

GATHER_THREADS, COMBINE_THREADS = 1024, 256

# Tokens of one launch, because the memory for gathered x and for sums grows with them.
MOST_TOKENS = 512
MOST_SPLITS = 4

GATHER = Struct(
    "GatherParameters", x=ACTIVATIONS, permutation=PERMUTATION, gathered=ACTIVATIONS, tokens=Int(), m=Int()
)
PARAMETERS = Struct(
    "WarpgroupParameters",
    gathered=ACTIVATIONS,
    matrix=MATRIX,
    y=ACTIVATIONS,
    sums=SUMS,
    tokens=Int(),
    splits=Int(),
)
COMBINE = Struct("CombineParameters", sums=SUMS, y=ACTIVATIONS, n=Int(), splits=Int())

SOURCE = Source(
    "warpgroup.cu",
    {
        "WARPS": WARPS,
        "THREADS": THREADS,
        "BLOCK_ROWS": BLOCK_ROWS,
        "TOKENS": TOKENS,
        "STAGES": STAGES,
        "GATHER_THREADS": GATHER_THREADS,
        "COMBINE_THREADS": COMBINE_THREADS,
    },
    [GATHER, PARAMETERS, COMBINE],
    {
        "gather": "GATHER(gather)",  # moves 16 bits, whatever they stand for
        "combine_float16": "COMBINE(combine_float16, Float16)",
        "combine_bfloat16": "COMBINE(combine_bfloat16, BFloat16)",
    }
    | {f"warpgroup_{kind}": f"WARPGROUP(warpgroup_{kind}, {c_types})" for kind, c_types in VARIANTS.items()},
    HOPPER_TARGET,
)


def multiply(x: Array, layout: Layout, device: Limits, y: Array, launch: Launch = launch) -> None:
    """``y = x Wᵀ``, W = αT + μ rounded to the type of x; see `gpu.kernels.decode.multiply`."""
    for first in range(0, len(x), MOST_TOKENS):
        rows = slice(first, first + MOST_TOKENS)
        _multiply(x[rows], layout, device, y[rows], launch)


def _multiply(x: Array, layout: Layout, device: Limits, y: Array, launch: Launch) -> None:
    (tokens, m), parts = x.shape, len(layout.ends)
    chunks, token_tiles = -(-m // CHUNK), -(-tokens // TOKENS)
    gathered = xp.empty((parts, token_tiles, chunks * CHUNK // 8, TOKENS, 8), x.dtype)
    arguments = GATHER.of(x=x, permutation=layout.permutation, gathered=gathered, tokens=tokens, m=m)
    launch(SOURCE, "gather", (tokens, parts), GATHER_THREADS, 2 * m, arguments)
    groups = sum(-(-(end - begin) // BLOCK_ROWS) for begin, end in zip((0, *layout.ends), layout.ends))  # noqa: B905
    # With few rows, SMs share the columns as well. The number of splits does not depend on the number of
    # tokens, so that a row of y does not either.
    splits = max(1, min(MOST_SPLITS, device.sms // groups, chunks))
    n = layout.ends[-1]
    sums = xp.empty((splits, tokens, n) if splits > 1 else 1, np.float32)
    arguments = PARAMETERS.of(
        gathered=gathered, matrix=matrix(layout), y=y, sums=sums, tokens=tokens, splits=splits
    )
    kernel = f"warpgroup_{variant(x.dtype, layout)}"
    launch(SOURCE, kernel, (groups, token_tiles * splits), THREADS, SHARED, arguments)
    if splits > 1:
        arguments = COMBINE.of(sums=sums, y=y, n=n, splits=splits)
        grid = -(-n // COMBINE_THREADS), tokens
        launch(SOURCE, f"combine_{TYPES[x.dtype.name]}", grid, COMBINE_THREADS, 0, arguments)
