"""Launcher of prefill.cu: the product for many tokens, on any device with tensor cores for bfloat16."""

from __future__ import annotations

from gpu.device import Array
from gpu.kernels.arrange import arrange
from gpu.kernels.layout import Layout
from gpu.kernels.parameters import ACTIVATIONS, MATRIX, SUMS, Int, Struct, matrix
from gpu.kernels.sources import PADDING, VARIANTS, WARP, Launch, Limits, Source, launch, variant
from reference.layout import CHUNK, SPAN

# Tiles of rows of a CUDA block, one a warp, and tokens of a block.
WARPS, TOKENS = 4, 64
THREADS = WARPS * WARP

# Elements from one token to the next in shared memory.
STRIDE = CHUNK + PADDING

PARAMETERS = Struct(
    "PrefillParameters",
    arranged=ACTIVATIONS,
    span_sums=SUMS,
    matrix=MATRIX,
    y=ACTIVATIONS,
    tokens=Int(),
    part=Int(),
    first_tile=Int(),
    last_tile=Int(),
    row=Int(),
    end=Int(),
)

SOURCE = Source(
    "prefill.cu",
    {"WARPS": WARPS, "TOKENS": TOKENS, "THREADS": THREADS, "STRIDE": STRIDE},
    [PARAMETERS],
    {f"prefill_{kind}": f"PREFILL(prefill_{kind}, {c_types})" for kind, c_types in VARIANTS.items()},
)


def multiply(x: Array, layout: Layout, device: Limits, y: Array, launch: Launch = launch) -> None:
    """``y = x (αT + μ)ᵀ`` for any number of tokens; see `gpu.kernels.decode.multiply`."""
    tokens = x.shape[0]
    arranged, span_sums = arrange(x, layout, launch)
    row = 0
    for part, (first_tile, last_tile) in enumerate(layout.tiles_of_parts()):
        arguments = PARAMETERS.of(
            arranged=arranged,
            span_sums=span_sums,
            matrix=matrix(layout),
            y=y,
            tokens=tokens,
            part=part,
            first_tile=first_tile,
            last_tile=last_tile,
            row=row,
            end=layout.ends[part],
        )
        grid = -(-(last_tile - first_tile) // WARPS), -(-tokens // TOKENS)
        shared = TOKENS * (STRIDE * 2 + CHUNK // SPAN * 4)
        launch(SOURCE, f"prefill_{variant(x.dtype, layout)}", grid, THREADS, shared, arguments)
        row = layout.ends[part]
