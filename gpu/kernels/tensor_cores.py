"""The CUDA C++ kernels: which one runs, with which grid and shared memory, and their launch.

`decode.cu` takes up to 16 tokens, `prefill.cu` more. They get their sources in one piece, as CuPy's cache
of compiled kernels does not look into headers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gpu.device import Array, xp
from gpu.kernels.product import CHUNK

# Types of x, and what they hold.
TYPES = {"float16": "float16", "uint16": "bfloat16", "int16": "bfloat16"}

# Tokens of decode.cu: two tiles of columns of B.
MOST_DECODED = 16

# The first tensor cores for bfloat16.
CAPABILITY = 80

# Shared memory of a block of decode.cu, if the device has that much: two blocks share a processor.
SHARED = 96 * 1024

# As in the sources.
SPAN = 64
TILE = 8
PADDING = 8
COLUMN_GROUPS = 8
DECODE_ROWS, DECODE_THREADS = 32, 512
ARRANGE_THREADS = 256
PREFILL_ROWS, PREFILL_TOKENS, PREFILL_THREADS = 128, 64, 128

# source, kernel, grid, threads, bytes of dynamic shared memory, arguments
Launch = Callable[[str, str, tuple[int, ...], int, int, Sequence[Any]], None]


def source(name: str) -> str:
    """A kernel's source with its headers before it; messages of the compiler name the files."""
    folder = Path(__file__).parent
    return "\n".join(
        f'#line 1 "{file}"\n{(folder / file).read_text(encoding="utf-8")}'
        for file in ("instructions.cuh", "ternary.cuh", name)
    )


@cache
def limits(number: int) -> tuple[int, int]:
    """Compute capability, as in 90, and most bytes of shared memory of a block, of a device."""
    device = xp.cuda.Device(number)
    return int(device.compute_capability), device.attributes["MaxSharedMemoryPerBlockOptin"]


def takes(m: int, block_size: int, capability: int, shared: int) -> bool:
    """Whether these kernels can multiply with m columns in such blocks on such a device."""
    whole_spans = block_size >= SPAN and block_size & (block_size - 1) == 0
    return whole_spans and capability >= CAPABILITY and 2 * m <= shared


@cache
def _module(name: str, device: int) -> Any:
    return xp.RawModule(code=source(name), options=("--std=c++17",))


@cache
def _function(name: str, kernel: str, device: int) -> Any:
    function = _module(name, device).get_function(kernel)
    # Without this a launch may ask for no more than 48 KiB. How much is taken is said at the launch.
    function.max_dynamic_shared_size_bytes = limits(device)[1]
    return function


def _launch(
    name: str, kernel: str, grid: tuple[int, ...], threads: int, shared: int, arguments: Sequence[Any]
) -> None:
    function = _function(name, kernel, xp.cuda.runtime.getDevice())
    function(grid, (threads,), tuple(arguments), shared_mem=shared)


def multiply(
    x: Array,
    words: Array,
    grid: Array,
    permutation: Array,
    block_size: int,
    shared: int,
    launch: Launch = _launch,
) -> Array:
    """``y = x (αT + μ)ᵀ`` for 16-bit activations; sums are float32.

    Parameters
    ----------
    x : (tokens, m) array
        Of a type in `TYPES`; at least one token.
    words : (n, 16 ceil(m / 256)) uint32
        Trits, as in `gpu.matmul.Packed`.
    grid : (n, blocks, 2) float16
        alpha and mu of every block.
    permutation : (m,) uint32
        Original column of every trit.
    block_size : int
        Columns in a block: 64, 128, 256, ...
    shared : int
        Most shared memory of a block, in bytes.
    launch : callable
        Runs a kernel; tests run them on the CPU.

    Returns
    -------
    y : (tokens, n) array of the type of x
    """
    (tokens, m), n = x.shape, words.shape[0]
    chunks = -(-m // CHUNK)
    kind = TYPES[x.dtype.name]
    block_shift = (block_size // SPAN).bit_length() - 1
    sizes = [np.int32(size) for size in (tokens, n, m, block_shift)]
    y = xp.empty((tokens, n), x.dtype)
    arranged, span_sums = x, permutation  # not read where x is gathered by the product itself
    phase, bytes_used = decode_phase(tokens, m, True, min(shared, SHARED))
    gather = tokens <= MOST_DECODED and phase == chunks
    if not gather:
        arranged = xp.empty((tokens, chunks * CHUNK), x.dtype)
        span_sums = xp.empty((tokens, chunks * CHUNK // SPAN), np.float32)
        arguments = (x, permutation, arranged, span_sums, np.int32(m))
        launch("prefill.cu", f"arrange_{kind}", (tokens,), ARRANGE_THREADS, 2 * m, arguments)
        phase, bytes_used = decode_phase(tokens, m, False, min(shared, SHARED))
    if tokens > MOST_DECODED:
        blocks = (-(-n // PREFILL_ROWS), -(-tokens // PREFILL_TOKENS))
        launch(
            "prefill.cu",
            f"prefill_{kind}",
            blocks,
            PREFILL_THREADS,
            PREFILL_TOKENS * ((CHUNK + PADDING) * 2 + CHUNK // SPAN * 4),
            (arranged, span_sums, words, grid, y, *sizes),
        )
    else:
        name = f"decode{_columns(tokens)}{'_gather' if gather else ''}_{kind}"
        arguments = (arranged, span_sums, permutation, words, grid, y, *sizes, np.int32(phase))
        launch("decode.cu", name, (-(-n // DECODE_ROWS),), DECODE_THREADS, bytes_used, arguments)
    return y


def _columns(tokens: int) -> int:
    return -(-tokens // TILE) * TILE


def decode_phase(tokens: int, m: int, gather: bool, shared: int) -> tuple[int, int]:
    """Chunks of x that decode.cu has in shared memory at a time, and the bytes it needs for all.

    It is all of them if they fit; else, without the gather, as many whole rounds of its warps as do.
    With the gather, 0 if they do not fit.
    """
    chunks, columns = -(-m // CHUNK), _columns(tokens)
    reduction = DECODE_THREADS // 32 * 16 * columns * 4

    def needed(phase: int) -> int:
        arranged = tokens * (phase * CHUNK + PADDING) * 2 + phase * (CHUNK // SPAN) * columns * 4
        return max(arranged + (2 * tokens * m if gather else 0), reduction)

    if needed(chunks) <= shared:
        return chunks, needed(chunks)
    if gather:
        return 0, 0
    rounds = COLUMN_GROUPS
    while needed(rounds + COLUMN_GROUPS) <= shared:
        rounds += COLUMN_GROUPS
    return rounds, needed(rounds)
