"""Trits to bytes and back on the device, in the layouts that `reference.packing` writes down."""

from __future__ import annotations

import numpy as np

from gpu.device import Array, xp
from gpu.kernels.packing import pack_rows, unpack_rows

# Digits in a byte, and their base: base 3 of the checkpoint, two bits of the kernels.
_BASE3 = (5, 3)
_TWO_BIT = (4, 4)


def pack_base3(trits: Array) -> Array:
    """Five trits to a byte.

    Parameters
    ----------
    trits : (..., m) array
        -1, 0 and +1; m may be 0.

    Returns
    -------
    (..., ceil(m / 5)) uint8

    Raises
    ------
    ValueError
        If a value is not a trit.
    """
    return _pack(trits, *_BASE3)


def unpack_base3(packed: Array, count: int) -> Array:
    """The inverse of `pack_base3`.

    Parameters
    ----------
    packed : (..., ceil(count / 5)) uint8
        Packed trits.
    count : int
        Trits in a row.

    Returns
    -------
    (..., count) int8

    Raises
    ------
    ValueError
        If `packed` is not uint8 or has another length, a byte is above 242, or the last byte is
        filled up with something other than t = 0.
    """
    return _unpack(packed, count, *_BASE3)


def pack_2bit(trits: Array) -> Array:
    """Four trits to a byte.

    Parameters
    ----------
    trits : (..., m) array
        -1, 0 and +1; m may be 0.

    Returns
    -------
    (..., ceil(m / 4)) uint8

    Raises
    ------
    ValueError
        If a value is not a trit.
    """
    return _pack(trits, *_TWO_BIT)


def unpack_2bit(packed: Array, count: int) -> Array:
    """The inverse of `pack_2bit`.

    Parameters
    ----------
    packed : (..., ceil(count / 4)) uint8
        Packed trits.
    count : int
        Trits in a row.

    Returns
    -------
    (..., count) int8

    Raises
    ------
    ValueError
        If `packed` is not uint8 or has another length, two bits are both set, or the last byte is
        filled up with something other than t = 0.
    """
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
