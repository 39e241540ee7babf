"""Launcher of arrange.cu: x in the order of trits."""

from __future__ import annotations

import numpy as np

from gpu.device import Array, xp
from gpu.kernels.layout import Layout
from gpu.kernels.parameters import ACTIVATIONS, PERMUTATION, SUMS, TYPES, Int, Struct
from gpu.kernels.sources import Launch, Source, launch
from reference.layout import CHUNK, SPAN

THREADS = 256

PARAMETERS = Struct(
    "ArrangeParameters",
    x=ACTIVATIONS,
    permutation=PERMUTATION,
    arranged=ACTIVATIONS,
    span_sums=SUMS,
    m=Int(),
    parts=Int(),
)

SOURCE = Source(
    "arrange.cu",
    {"THREADS": THREADS},
    [PARAMETERS],
    {
        "arrange_float16": "ARRANGE(arrange_float16, Float16)",
        "arrange_bfloat16": "ARRANGE(arrange_bfloat16, BFloat16)",
    },
)


def arrange(x: Array, layout: Layout, launch: Launch = launch) -> tuple[Array, Array]:
    """Activations in the order of trits, for every part of a layout.

    Parameters
    ----------
    x : (tokens, m) array
        Of a type in `gpu.kernels.parameters.TYPES`; at least one token.
    layout : Layout
        Whose permutations are applied.
    launch : callable
        Runs a kernel; tests run kernels on the CPU.

    Returns
    -------
    arranged : (parts, tokens, 256 chunks) array of the type of x
        Filled up with 0. Of the 16 columns of a word, column i lies beside column i + 8.
    span_sums : (parts, tokens, 4 chunks) float32
        Sums of 64 columns.
    """
    (tokens, m), parts = x.shape, len(layout.ends)
    width = -(-m // CHUNK) * CHUNK
    arranged = xp.empty((parts, tokens, width), x.dtype)
    span_sums = xp.empty((parts, tokens, width // SPAN), np.float32)
    arguments = PARAMETERS.of(
        x=x, permutation=layout.permutation, arranged=arranged, span_sums=span_sums, m=m, parts=parts
    )
    launch(SOURCE, f"arrange_{TYPES[x.dtype.name]}", (tokens,), THREADS, 2 * m, arguments)
    return arranged, span_sums
