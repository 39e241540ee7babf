"""Launcher of decode.cu: the product for up to 16 tokens."""

from __future__ import annotations

from gpu.device import Array
from gpu.kernels.arrange import arrange
from gpu.kernels.layout import Layout
from gpu.kernels.parameters import ACTIVATIONS, MATRIX, Int, Pointer, Struct, matrix
from gpu.kernels.sources import (
    PADDING,
    ROWS,
    TILE,
    VARIANTS,
    WARP,
    Launch,
    Limits,
    Source,
    launch,
    variant,
)
from reference.layout import CHUNK, SPAN, TILE_ROWS, WORDS

# Two tiles of columns of B.
MOST_TOKENS = 2 * TILE

# Warps that share the rows of a tile, and warps that share its columns.
ROW_GROUPS, COLUMN_GROUPS = TILE_ROWS // ROWS, 8
THREADS = ROW_GROUPS * COLUMN_GROUPS * WARP

# Chunks of a warp that are in use or prefetched, and the bytes of each: words of 16 rows, and up to four
# pairs of float16 a row.
STAGES = 3
STAGE_BYTES = ROWS * WORDS * 4 + ROWS * (CHUNK // SPAN) * 4

PARAMETERS = Struct(
    "DecodeParameters",
    x=ACTIVATIONS,
    span_sums=Pointer("float32", optional=True),
    matrix=MATRIX,
    y=ACTIVATIONS,
    tokens=Int(),
    phase=Int(),
)


def _name(columns: int, gather: bool, kind: str) -> str:
    return f"decode{columns}{'_gather' if gather else ''}_{kind}"


SOURCE = Source(
    "decode.cu",
    {
        "ROW_GROUPS": ROW_GROUPS,
        "COLUMN_GROUPS": COLUMN_GROUPS,
        "THREADS": THREADS,
        "STAGES": STAGES,
        "STAGE_BYTES": STAGE_BYTES,
    },
    [PARAMETERS],
    {
        name: f"DECODE({name}, {c_types}, {tiles}, {str(gather).lower()})"
        for kind, c_types in VARIANTS.items()
        for tiles in (1, 2)
        for gather in (True, False)
        for name in [_name(TILE * tiles, gather, kind)]
    },
)


def multiply(x: Array, layout: Layout, device: Limits, y: Array, launch: Launch = launch) -> None:
    """``y = x (αT + μ)ᵀ`` for 1 to `MOST_TOKENS` tokens; sums are float32.

    Parameters
    ----------
    x : (tokens, m) array
        Of a type in `gpu.kernels.parameters.TYPES`.
    layout : Layout
        The matrix, or the matrices.
    device : Limits
        Where it runs.
    y : (tokens, n) array of the type of x
        Is overwritten.
    launch : callable
        Runs a kernel; tests run kernels on the CPU.
    """
    tokens, m = x.shape
    some = tokens_at_once(tokens, m, device.shared)
    for first in range(0, tokens, some):
        _multiply(x[first : first + some], layout, device, y[first : first + some], launch)


def _multiply(x: Array, layout: Layout, device: Limits, y: Array, launch: Launch) -> None:
    tokens, m = x.shape
    phase, shared = chunks_at_once(tokens, m, True, device.shared)
    gather = phase > 0
    span_sums = None
    if not gather:
        phase, shared = chunks_at_once(tokens, m, False, device.shared)
        x, span_sums = arrange(x, layout, launch)
    arguments = PARAMETERS.of(
        x=x, span_sums=span_sums, matrix=matrix(layout), y=y, tokens=tokens, phase=phase
    )
    kernel = _name(_columns(tokens), gather, variant(y.dtype, layout))
    launch(SOURCE, kernel, (min(layout.tiles, device.sms),), THREADS, shared, arguments)


def _columns(tokens: int) -> int:
    return -(-tokens // TILE) * TILE


def tokens_at_once(tokens: int, m: int, shared: int) -> int:
    """How many tokens a launch takes, of at most `MOST_TOKENS`.

    All, unless their x does not fit into shared memory. Then x would be read again for each tile, and for
    16 tokens that is 3.6 times as much as the words of a tile. If x of fewer tokens fits, the words are read
    up to three times instead.
    """
    for launches in (1, 2, 3):
        some = -(-tokens // launches)
        if chunks_at_once(some, m, False, shared)[0] == -(-m // CHUNK):
            return some
    return tokens


def chunks_at_once(tokens: int, m: int, gather: bool, shared: int) -> tuple[int, int]:
    """Chunks of x that lie in shared memory at a time, and the bytes of shared memory of a block.

    All chunks if they fit. Otherwise as many as fit without the gather, and 0 with it, because the gather
    needs the whole row.
    """
    chunks, columns = -(-m // CHUNK), _columns(tokens)
    warps = THREADS // WARP
    fixed = warps * (STAGES * STAGE_BYTES + ROWS * columns * 4) + tokens * PADDING * 2
    chunk = tokens * CHUNK * 2 + CHUNK // SPAN * columns * 4
    needed = fixed + chunks * chunk + (2 * tokens * m if gather else 0)
    if needed <= shared:
        return chunks, needed
    if gather:
        return 0, 0
    phase = (shared - fixed) // chunk
    return phase, fixed + phase * chunk
