"""Pack trits into bytes and unpack them, one row per CUDA block; `reference.packing` describes the layouts.

The base-3 and 2-bit layouts differ only in base and digits per byte: byte b of a row holds the trits from
index ``digits * b``, the first with place value 1.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda, njit

from gpu.device import STANDIN, Array, xp
from gpu.kernels.lanes import CPU, CUDA, LANES, Target
from gpu.kernels.launching import launch


def _build(target: Target, note: Any) -> tuple[Any, Any]:
    """Build the kernel bodies for one row; `note` lowers an entry of `damage` to the position of a byte."""

    @target.jit
    def pack_row(trits, packed, digits, base, damage, row, lane, lanes):
        count = trits.shape[1]
        for b in range(lane, packed.shape[1], lanes):
            code = 0
            for place in range(digits - 1, -1, -1):
                j = b * digits + place
                t = np.int64(0)  # pads the last byte
                if j < count:
                    t = np.int64(trits[row, j])
                if t < -1 or t > 1:
                    note(damage, 0, np.int64(row) * packed.shape[1] + b)
                    t = np.int64(0)
                code = code * base + t + 1
            packed[row, b] = code

    @target.jit
    def unpack_row(packed, trits, digits, base, damage, row, lane, lanes):
        count = trits.shape[1]
        for b in range(lane, packed.shape[1], lanes):
            code = np.int64(packed[row, b])
            position = np.int64(row) * packed.shape[1] + b
            for place in range(digits):
                j = b * digits + place
                digit = code
                if place < digits - 1:  # the last digit keeps the quotient, above 2 for an invalid byte
                    digit = code % base
                code //= base
                if digit > 2:
                    note(damage, 0, position)
                elif j < count:
                    trits[row, j] = digit - 1
                elif digit != 1:
                    note(damage, 1, position)

    return pack_row, unpack_row


if CPU is not None:

    @njit
    def _note_cpu(damage, kind, position):
        damage[kind] = min(damage[kind], position)

    _pack_row_cpu, _unpack_row_cpu = _build(CPU, _note_cpu)

    @njit
    def _pack_rows_cpu(trits, packed, digits, base, damage):
        for row in range(packed.shape[0]):
            _pack_row_cpu(trits, packed, digits, base, damage, row, 0, 1)

    @njit
    def _unpack_rows_cpu(packed, trits, digits, base, damage):
        for row in range(packed.shape[0]):
            _unpack_row_cpu(packed, trits, digits, base, damage, row, 0, 1)


@cuda.jit(device=True)
def _note(damage, kind, position):
    cuda.atomic.min(damage, kind, position)


_pack_row, _unpack_row = _build(CUDA, _note)


@cuda.jit
def pack_rows_kernel(trits, packed, digits, base, damage):
    """One row per CUDA block; see `pack_rows` for the arguments."""
    _pack_row(trits, packed, digits, base, damage, cuda.blockIdx.x, cuda.threadIdx.x, LANES)


@cuda.jit
def unpack_rows_kernel(packed, trits, digits, base, damage):
    """One row per CUDA block; see `unpack_rows` for the arguments."""
    _unpack_row(packed, trits, digits, base, damage, cuda.blockIdx.x, cuda.threadIdx.x, LANES)


def pack_rows(trits: Array, digits: int, base: int, simulate: bool = False) -> tuple[Array, Array]:
    """Pack trits into bytes of `digits` digits in `base`.

    Parameters
    ----------
    trits : (..., m) int8
        -1, 0 and +1; m may be 0.
    digits, base : int
        The layout: 5 and 3, or 4 and 4.
    simulate : bool
        In the stand-in, run the CUDA kernel in Numba's simulator instead of its body on the CPU.

    Returns
    -------
    packed : (..., ceil(m / digits)) uint8
    damage : (2,) int64
        damage[0]: position, counted over all rows, of the first byte whose input is not all trits;
        `packed.size` if there is none.
    """
    *rows, count = trits.shape
    packed = xp.empty((*rows, -(-count // digits)), np.uint8)
    damage = xp.full(2, packed.size, np.int64)
    arguments = (_rows(trits), _rows(packed), digits, base, damage)
    if STANDIN and not simulate:
        _pack_rows_cpu(*arguments)
    elif packed.size:  # CUDA has no empty grid
        launch(pack_rows_kernel, arguments[0].shape[0], *arguments)
    return packed, damage


def unpack_rows(
    packed: Array, count: int, digits: int, base: int, simulate: bool = False
) -> tuple[Array, Array]:
    """Unpack trits from bytes, the inverse of `pack_rows`.

    Parameters
    ----------
    packed : (..., ceil(count / digits)) uint8
        Packed trits.
    count : int
        Trits in a row.
    digits, base : int
        The layout: 5 and 3, or 4 and 4.
    simulate : bool
        In the stand-in, run the CUDA kernel in Numba's simulator instead of its body on the CPU.

    Returns
    -------
    trits : (..., count) int8
        Undefined in a damaged byte.
    damage : (2,) int64
        Positions, counted over all rows, of the first invalid byte and of the first byte padded with
        anything but t = 0; `packed.size` if there is none.
    """
    trits = xp.empty((*packed.shape[:-1], count), np.int8)
    damage = xp.full(2, packed.size, np.int64)
    arguments = (_rows(packed), _rows(trits), digits, base, damage)
    if STANDIN and not simulate:
        _unpack_rows_cpu(*arguments)
    elif packed.size:
        launch(unpack_rows_kernel, arguments[0].shape[0], *arguments)
    return trits, damage


def _rows(A: Array) -> Array:
    return xp.ascontiguousarray(A).reshape(math.prod(A.shape[:-1]), A.shape[-1])
