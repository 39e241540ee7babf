"""The CUDA C++ kernels: which one runs, with which grid and shared memory, and their launch.

`decode.cu` takes up to 16 tokens, `warpgroup.cu` more on Hopper, `prefill.cu` elsewhere; `dense.cu` makes
weights for a library's product. A kernel gets its sources in one piece, as CuPy's cache of compiled kernels
does not look into headers, and is compiled alone, so that the first product waits for no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpu.device import Array, xp
from gpu.kernels.layout import CHUNK, PARTS, TILE_ROWS, Layout

# Types of x, and what they hold.
TYPES = {"float16": "float16", "uint16": "bfloat16", "int16": "bfloat16"}

# Tokens of decode.cu: two tiles of columns of B.
MOST_DECODED = 16

# Tokens of warpgroup.cu at a time, as its room for sums grows with them.
MOST_FOR_WARPGROUPS = 512

# The first tensor cores for bfloat16, and the first copies past the registers.
CAPABILITY = 80

# The one that has the instructions of warpgroup.cu, and its target with what no later one has.
HOPPER, HOPPER_TARGET = 90, "sm_90a"

# Products that are to be rounded before they are added are not contracted; what may be says fmaf.
OPTIONS = ("--std=c++17", "--fmad=false")

# As in the sources.
SPAN = 64
TILE = 8
PADDING = 8
DECODE_THREADS, DECODE_STAGES = 512, 3
STAGE_BYTES = 2 * 512 + 256
ARRANGE_THREADS = 256
PREFILL_TILES, PREFILL_TOKENS, PREFILL_THREADS = 4, 64, 128
DENSE_THREADS, COUPLES = 256, 8
WARPGROUP_THREADS, WARPGROUP_ROWS, WARPGROUP_TOKENS, WARPGROUP_STAGES = 256, 128, 128, 3
GATHER_THREADS, COMBINE_THREADS = 1024, 256
MOST_SPLITS = 4

# source, kernel, grid, threads, bytes of dynamic shared memory, arguments
Launch = Callable[[str, str, tuple[int, ...], int, int, Sequence[Any]], None]


class Limits(NamedTuple):
    """What a device has: compute capability, as in 90, bytes of shared memory a block, processors."""

    capability: int
    shared: int
    processors: int


@cache
def limits(number: int) -> Limits:
    """Those of a device."""
    device = xp.cuda.Device(number)
    attributes = device.attributes
    return Limits(
        int(device.compute_capability),
        attributes["MaxSharedMemoryPerBlockOptin"],
        attributes["MultiProcessorCount"],
    )


def kernels(name: str) -> dict[str, str]:
    """Kernels of a source by name, with the macro that defines each."""
    found = {}
    for dtype, c_type in (("float16", "Float16"), ("bfloat16", "BFloat16")):
        if name == "prefill.cu":
            found[f"arrange_{dtype}"] = f"ARRANGE(arrange_{dtype}, {c_type})"
        if name == "warpgroup.cu":
            found["gather"] = "GATHER(gather)"  # of 16 bits, whatever they are
            found[f"combine_{dtype}"] = f"COMBINE(combine_{dtype}, {c_type})"
        for kind, c_grid in ((dtype, "Float16Grid"), (f"{dtype}_int8", "Int8Grid")):
            if name != "decode.cu":
                kernel = f"{name.removesuffix('.cu')}_{kind}"
                found[kernel] = f"{name.removesuffix('.cu').upper()}({kernel}, {c_type}, {c_grid})"
                continue
            for tiles, gather in product((1, 2), (True, False)):
                kernel = _decode_name(TILE * tiles, gather, kind)
                found[kernel] = f"DECODE({kernel}, {c_type}, {c_grid}, {tiles}, {str(gather).lower()})"
    return found


def source(name: str, wanted: Sequence[str]) -> str:
    """The source of some kernels of a file with its headers; messages of the compiler name the files."""
    folder = Path(__file__).parent
    files = ("instructions.cuh", "ternary.cuh", name)
    texts = [f'#line 1 "{file}"\n{(folder / file).read_text(encoding="utf-8")}' for file in files]
    return "\n".join([*texts, *(kernels(name)[kernel] for kernel in wanted)]) + "\n"


def takes(layout: Layout, device: Limits) -> bool:
    """Whether these kernels can multiply with such a matrix on such a device."""
    fits = 2 * layout.columns <= device.shared and layout.permutation.dtype == np.uint16
    return layout.tiled and device.capability >= CAPABILITY and fits


@cache
def _function(name: str, kernel: str, device: int) -> Any:
    code = source(name, [kernel])
    if name != "warpgroup.cu":
        function = xp.RawModule(code=code, options=OPTIONS).get_function(kernel)
        # Without this a launch may ask for no more than 48 KiB. How much is taken is said at the launch.
        function.max_dynamic_shared_size_bytes = limits(device).shared
        return function
    # RawModule compiles for the device's own target, sm_90.
    nvrtc, driver = xp.cuda.nvrtc, xp.cuda.driver
    program = nvrtc.createProgram(code, name, (), ())
    try:
        nvrtc.compileProgram(program, (*OPTIONS, f"-arch={HOPPER_TARGET}", "-ftz=true"))
        module = xp.cuda.function.Module()
        module.load(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{name} does not compile: {nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)
    function = module.get_function(kernel)
    attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    driver.funcSetAttribute(function.ptr, attribute, limits(device).shared)
    return function


def _launch(
    name: str, kernel: str, grid: tuple[int, ...], threads: int, shared: int, arguments: Sequence[Any]
) -> None:
    function = _function(name, kernel, xp.cuda.runtime.getDevice())
    function(grid, (threads,), tuple(arguments), shared_mem=shared)


def multiply(x: Array, layout: Layout, device: Limits, y: Array, launch: Launch = _launch) -> None:
    """``y = x (αT + μ)ᵀ`` for 16-bit activations; sums are float32.

    Parameters
    ----------
    x : (tokens, m) array
        Of a type in `TYPES`; at least one token.
    layout : Layout
        Matrices that the kernels take.
    device : Limits
        Where it runs.
    y : (tokens, n) array of the type of x
        Is overwritten.
    launch : callable
        Runs a kernel; tests run them on the CPU.
    """
    tokens, m = x.shape
    if tokens <= MOST_DECODED:
        some = tokens_at_once(tokens, m, device.shared)
        for first in range(0, tokens, some):
            _decode(x[first : first + some], layout, device, y[first : first + some], launch)
        return
    if takes_warpgroups(x, layout, device):
        for first in range(0, tokens, MOST_FOR_WARPGROUPS):
            rows = slice(first, first + MOST_FOR_WARPGROUPS)
            _multiply_by_warpgroups(x[rows], layout, device, y[rows], launch)
        return
    arranged, span_sums = arrange(x, layout, launch)
    row = 0
    for part, (first_tile, last_tile) in enumerate(layout.tiles_of_parts()):
        end = layout.ends[part]
        sizes = (tokens, layout.ends[-1], m, layout.pairs_shift, part, first_tile, last_tile, row, end)
        launch(
            "prefill.cu",
            f"prefill_{_kind(x.dtype, layout)}",
            (-(-(last_tile - first_tile) // PREFILL_TILES), -(-tokens // PREFILL_TOKENS)),
            PREFILL_THREADS,
            PREFILL_TOKENS * ((CHUNK + PADDING) * 2 + CHUNK // SPAN * 4),
            (arranged, span_sums, *_arguments(layout), y, *map(np.int32, sizes)),
        )
        row = end


def takes_warpgroups(x: Array, layout: Layout, device: Limits) -> bool:
    """Whether warpgroup.cu multiplies these, of a layout that `takes` holds for."""
    on_hopper = device.capability == HOPPER and _warpgroup_shared() <= device.shared
    return len(x) > MOST_DECODED and on_hopper and holds_weights(x.dtype, layout)


def holds_weights(dtype: Any, layout: Layout) -> bool:
    """Whether all weights are finite in a type of `TYPES`; bfloat16 has room for any alpha and mu."""
    return layout.in_float16 or TYPES[dtype.name] != "float16"


def _warpgroup_shared() -> int:
    return WARPGROUP_STAGES * CHUNK * WARPGROUP_TOKENS * 2


def _multiply_by_warpgroups(x: Array, layout: Layout, device: Limits, y: Array, launch: Launch) -> None:
    (tokens, m), parts = x.shape, len(layout.ends)
    chunks, token_tiles = -(-m // CHUNK), -(-tokens // WARPGROUP_TOKENS)
    gathered = xp.empty((parts, token_tiles, chunks * CHUNK // 8, WARPGROUP_TOKENS, 8), x.dtype)
    arguments = (x, layout.permutation, gathered, np.int32(tokens), np.int32(m))
    launch("warpgroup.cu", "gather", (tokens, parts), GATHER_THREADS, 2 * m, arguments)
    groups = sum(-(-(end - begin) // WARPGROUP_ROWS) for begin, end in zip((0, *layout.ends), layout.ends))  # noqa: B905
    # Where there are few rows, columns are shared out among processors as well: not by the number of tokens,
    # so that a row of y does not depend on how many there are.
    splits = max(1, min(MOST_SPLITS, device.processors // groups, chunks))
    n = layout.ends[-1]
    sums = xp.empty((splits, tokens, n) if splits > 1 else 1, np.float32)
    launch(
        "warpgroup.cu",
        f"warpgroup_{_kind(x.dtype, layout)}",
        (groups, token_tiles * splits),
        WARPGROUP_THREADS,
        _warpgroup_shared(),
        (
            gathered,
            *_arguments(layout),
            y,
            sums,
            *map(np.int32, (tokens, m, layout.pairs_shift, splits, *_padded(layout.ends))),
        ),
    )
    if splits > 1:
        kernel, grid = f"combine_{TYPES[x.dtype.name]}", (-(-n // COMBINE_THREADS), tokens)
        launch("warpgroup.cu", kernel, grid, COMBINE_THREADS, 0, (sums, y, np.int32(n), np.int32(splits)))


def _decode(x: Array, layout: Layout, device: Limits, y: Array, launch: Launch) -> None:
    tokens, m = x.shape
    phase, shared = decode_phase(tokens, m, True, device.shared)
    gather = phase > 0
    arranged, span_sums = x, layout.permutation  # sums are not read where x is gathered by the product itself
    if not gather:
        arranged, span_sums = arrange(x, layout, launch)
        phase, shared = decode_phase(tokens, m, False, device.shared)
    sizes = (tokens, m, layout.pairs_shift, phase, *_padded(layout.ends))
    launch(
        "decode.cu",
        _decode_name(_columns(tokens), gather, _kind(x.dtype, layout)),
        (min(layout.tiles, device.processors),),
        DECODE_THREADS,
        shared,
        (arranged, span_sums, layout.permutation, *_arguments(layout), y, *map(np.int32, sizes)),
    )


def arrange(x: Array, layout: Layout, launch: Launch = _launch) -> tuple[Array, Array]:
    """Activations in the order of trits, for every part of a layout.

    Parameters
    ----------
    x : (tokens, m) array
        Of a type in `TYPES`; at least one token.
    layout : Layout
        Whose orders are taken.
    launch : callable
        As for `multiply`.

    Returns
    -------
    arranged : (parts, tokens, 256 chunks) array of the type of x
        Filled up with 0; of the 16 columns of a word the i-th and the (i + 8)-th lie side by side.
    span_sums : (parts, tokens, 4 chunks) float32
        Sums of 64 columns.
    """
    (tokens, m), parts = x.shape, len(layout.ends)
    width = -(-m // CHUNK) * CHUNK
    arranged = xp.empty((parts, tokens, width), x.dtype)
    span_sums = xp.empty((parts, tokens, width // SPAN), np.float32)
    arguments = (x, layout.permutation, arranged, span_sums, np.int32(m), np.int32(parts))
    kernel = f"arrange_{TYPES[x.dtype.name]}"
    launch("prefill.cu", kernel, (tokens,), ARRANGE_THREADS, 2 * m, arguments)
    return arranged, span_sums


def unpack(layout: Layout, part: int, dtype: Any, device: Limits, launch: Launch = _launch) -> Array:
    """Dense weights of a part, columns in the original order.

    Parameters
    ----------
    layout : Layout
        Matrices that the kernels take.
    part : int
        Which of them.
    dtype : dtype
        A type in `TYPES`, to which weights are rounded.
    device : Limits
        Where it runs; `couples_at_once` must not be 0.
    launch : callable
        As for `multiply`.

    Returns
    -------
    (rows, m) array
        Every row begins at a multiple of 16 bytes, as libraries are faster then.
    """
    m = layout.columns
    first_tile, last_tile = layout.tiles_of_parts()[part]
    width, stride = -(-m // 8) * 8, _couple_stride(m)
    weights = xp.empty(((last_tile - first_tile) * TILE_ROWS, width), dtype)
    couples = couples_at_once(m, device.shared)
    launch(
        "dense.cu",
        f"dense_{_kind(np.dtype(dtype), layout)}",
        ((last_tile - first_tile) * (TILE_ROWS // 2 // couples),),
        DENSE_THREADS,
        couples * stride * 4,
        (
            *_arguments(layout),
            layout.permutation,
            weights,
            *map(np.int32, (m, width, stride, couples, layout.pairs_shift, part, first_tile)),
        ),
    )
    return weights[: layout.ends[part] - (layout.ends[part - 1] if part else 0), :m]


def couples_at_once(m: int, shared: int) -> int:
    """How many couples of rows a block of dense.cu takes: 8, 4, 2 or 1, or 0 if not even one fits.

    As many as leave room for three blocks on a processor, so that one writes what it has while another
    reads.
    """
    stride = 4 * _couple_stride(m)
    for couples in (COUPLES, COUPLES // 2, COUPLES // 4):
        if 3 * couples * stride <= shared:
            return couples
    return int(stride <= shared)


def _couple_stride(m: int) -> int:
    """Words of shared memory from one couple to the next, so that their first ones are in other banks."""
    return -(-m // 8) * 8 + 4


def _padded(ends: tuple[int, ...]) -> tuple[int, ...]:
    return ends + ends[-1:] * (PARTS - len(ends))


def _kind(dtype: Any, layout: Layout) -> str:
    """How kernels for a type of x and a layout's grid are called."""
    return TYPES[dtype.name] + ("" if layout.row_factors is None else "_int8")


def _arguments(layout: Layout) -> tuple[Array, Array, Array, Array]:
    """Words, grid, and factors of blocks and of rows; where there are none, what is not read."""
    block_factors = layout.words if layout.block_factors is None else layout.block_factors
    row_factors = layout.words if layout.row_factors is None else layout.row_factors
    return layout.words, layout.grid, block_factors, row_factors


def _decode_name(columns: int, gather: bool, kind: str) -> str:
    return f"decode{columns}{'_gather' if gather else ''}_{kind}"


def _columns(tokens: int) -> int:
    return -(-tokens // TILE) * TILE


def tokens_at_once(tokens: int, m: int, shared: int) -> int:
    """How many tokens a launch of decode.cu takes, of at most `MOST_DECODED`.

    All, unless their x does not fit into shared memory. It would be read again for each tile then, and for
    16 tokens that is 3.6 times as much as the words of a tile; so the words are read up to three times
    instead, where x of fewer tokens fits.
    """
    for launches in (1, 2, 3):
        some = -(-tokens // launches)
        if decode_phase(some, m, False, shared)[0] == -(-m // CHUNK):
            return some
    return tokens


def decode_phase(tokens: int, m: int, gather: bool, shared: int) -> tuple[int, int]:
    """Chunks of x that decode.cu has in shared memory at a time, and the bytes it needs for all.

    It is all of them if they fit; else, without the gather, as many as do. With the gather, 0 if they do
    not fit.
    """
    chunks, columns = -(-m // CHUNK), _columns(tokens)
    warps = DECODE_THREADS // 32
    fixed = warps * (DECODE_STAGES * STAGE_BYTES + 16 * columns * 4) + tokens * PADDING * 2
    chunk = tokens * CHUNK * 2 + CHUNK // SPAN * columns * 4
    needed = fixed + chunks * chunk + (2 * tokens * m if gather else 0)
    if needed <= shared:
        return chunks, needed
    if gather:
        return 0, 0
    phase = (shared - fixed) // chunk
    return phase, fixed + phase * chunk
