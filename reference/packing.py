"""The checkpoint's bytes, format version 2: trits to bytes and back.

A linear layer NAME with weights (n, m) in blocks of k columns is stored as these tensors:

``NAME.trits``        uint8, (n, ceil(m / 5)). Base 3, columns in quantization order. Byte b of a row
                      holds trits 5b to 5b+4, trit 5b+i as the digit t + 1 in {0, 1, 2} with the
                      place value 3^i, so a byte is at most 242. The last byte of a row is filled up
                      with t = 0 (digit 1). Bytes above 242 and other fillings are refused.
``NAME.scale``        float16, (n, ceil(m / k)): alpha of every block.
``NAME.shift``        float16, (n, ceil(m / k)): mu of every block.
                      If the model's ``grid`` is int8, both are int8 codes in -127..127, and there are
                      ``NAME.row_factor`` (n,) and ``NAME.scale_factor``, ``NAME.shift_factor``
                      (ceil(m / k),) in float16: alpha of row i in block b is
                      ``float32(row_factor[i]) * float32(scale_factor[b]) * scale[i, b]``.
                      If the model is ``symmetric``, ``NAME.shift`` and ``NAME.shift_factor`` are left out,
                      and every mu is +0.
``NAME.permutation``  (m,), the smallest of uint8, uint16, uint32 that holds m - 1: trit j of a row
                      belongs to column ``permutation[j]``. Left out where it is the identity, and
                      NAME is then listed as ``unpermuted`` in the model's configuration.
``NAME.bias``         as it was, if there was one.

The weight of row i at column ``permutation[j]`` is
``float32(scale[i, j // k]) * t + float32(shift[i, j // k])``, then rounded to the model's dtype.

Kernels use two bits a trit instead, made when a checkpoint is loaded: byte b holds trits 4b to 4b+3,
trit 4b+i as the digit t + 1 in bits 2i and 2i+1, the last byte filled up with t = 0; 3 is no digit.
`reference.layout` says where these bytes lie.

Version 1 had the same bytes, but no models without a shift. Version 2 adds an entry to config.json that makes
transformers refuse the model where this package is not imported (`harness.ternary.notice`); version 1 was
loaded there with random weights.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reference.checks import Trits

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)

Bytes = NDArray[np.uint8]

_BASE3_PLACES = 3 ** np.arange(5, dtype=np.uint8)
_TWO_BIT_PLACES = 4 ** np.arange(4, dtype=np.uint8)


def pack_base3(trits: ArrayLike) -> Bytes:
    """Five trits to a byte.

    Parameters
    ----------
    trits : (..., m) array_like
        -1, 0 and +1; m may be 0.

    Returns
    -------
    (..., ceil(m / 5)) uint8
        The layout of this module's docstring.

    Raises
    ------
    ValueError
        If a value is not a trit.

    Examples
    --------
    >>> pack_base3([1, 0, -1, 0, 0, 1]).tolist()
    [113, 122]
    """
    return _pack(trits, _BASE3_PLACES)


def unpack_base3(packed: ArrayLike, count: int) -> Trits:
    """The inverse of `pack_base3`.

    Parameters
    ----------
    packed : (..., ceil(count / 5)) array_like of uint8
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
    return _unpack(packed, count, _BASE3_PLACES, 3)


def pack_2bit(trits: ArrayLike) -> Bytes:
    """Four trits to a byte.

    Parameters
    ----------
    trits : (..., m) array_like
        -1, 0 and +1; m may be 0.

    Returns
    -------
    (..., ceil(m / 4)) uint8
        The layout of this module's docstring.

    Raises
    ------
    ValueError
        If a value is not a trit.

    Examples
    --------
    >>> pack_2bit([1, 0, -1, 0, 1]).tolist()
    [70, 86]
    """
    return _pack(trits, _TWO_BIT_PLACES)


def unpack_2bit(packed: ArrayLike, count: int) -> Trits:
    """The inverse of `pack_2bit`.

    Parameters
    ----------
    packed : (..., ceil(count / 4)) array_like of uint8
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
    return _unpack(packed, count, _TWO_BIT_PLACES, 4)


def _pack(trits: ArrayLike, places: NDArray[np.uint8]) -> Bytes:
    values = np.asarray(trits)
    if not ((values == -1) | (values == 0) | (values == 1)).all():
        raise ValueError("trits must be -1, 0 or +1")
    filling = -values.shape[-1] % places.size
    filled = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, filling)])
    digits = (
        (filled + 1)
        .astype(np.uint8)
        .reshape(*filled.shape[:-1], filled.shape[-1] // places.size, places.size)
    )
    return (digits * places).sum(axis=-1, dtype=np.uint8)


def _unpack(packed: ArrayLike, count: int, places: NDArray[np.uint8], base: int) -> Trits:
    values = np.asarray(packed)
    if values.dtype != np.uint8:
        raise ValueError(f"packed trits must be uint8, got {values.dtype}")
    if count < 0 or values.ndim == 0 or values.shape[-1] != -(-count // places.size):
        raise ValueError(
            f"{count} trits take {-(-count // places.size)} bytes a row, got shape {values.shape}"
        )
    digits = values[..., None] // places
    # The highest digit keeps what is beyond it, so that a byte that is no code shows as a digit above 2.
    digits[..., :-1] %= base
    if (digits > 2).any():
        raise ValueError(
            f"byte {int(values[(digits > 2).any(axis=-1)][0])} is not the code of {places.size} trits"
        )
    digits = digits.reshape(*values.shape[:-1], values.shape[-1] * places.size)
    if (digits[..., count:] != 1).any():
        raise ValueError(f"the last byte must be filled up with t = 0 beyond trit {count}")
    return digits[..., :count].astype(np.int8) - np.int8(1)
