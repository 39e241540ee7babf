"""Trits to bytes and back on the device; see `reference.packing`, which documents both layouts."""

from __future__ import annotations

import numpy as np

from gpu.device import Array, xp
from gpu.kernels.packing import pack_rows, unpack_rows
from gpu.twin import twin

# Digits in a byte, and their base: the checkpoint uses base 3, kernels use two bits a trit.
_BASE3 = (5, 3)
_TWO_BIT = (4, 4)


@twin
def pack_base3(trits: Array) -> Array:
    return _pack(trits, *_BASE3)


@twin
def unpack_base3(packed: Array, count: int) -> Array:
    return _unpack(packed, count, *_BASE3)


@twin
def pack_2bit(trits: Array) -> Array:
    return _pack(trits, *_TWO_BIT)


@twin
def unpack_2bit(packed: Array, count: int) -> Array:
    return _unpack(packed, count, *_TWO_BIT)


def _pack(trits: Array, digits: int, base: int) -> Array:
    trits = xp.asarray(trits)
    with np.errstate(invalid="ignore"):
        narrow = trits.astype(np.int8, copy=False)
    changed = narrow is not trits and bool((narrow != trits).any())
    packed, damage = pack_rows(narrow, digits, base)
    if changed or int(damage[0]) < packed.size:
        raise ValueError("trits must be -1, 0 or +1")
    return packed


def _unpack(packed: Array, count: int, digits: int, base: int) -> Array:
    packed = xp.asarray(packed)
    if packed.dtype != np.uint8:
        raise ValueError(f"packed trits must be uint8, got {packed.dtype}")
    if count < 0 or packed.ndim == 0 or packed.shape[-1] != -(-count // digits):
        raise ValueError(f"{count} trits take {-(-count // digits)} bytes a row, got shape {packed.shape}")
    trits, damage = unpack_rows(packed, count, digits, base)
    no_code, filling = damage.tolist()
    if no_code < packed.size:
        raise ValueError(f"byte {int(packed.ravel()[no_code])} is not the code of {digits} trits")
    if filling < packed.size:
        raise ValueError(f"the last byte must be filled up with t = 0 beyond trit {count}")
    return trits
