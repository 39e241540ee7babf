"""The types of GGUF that hold ternary weights, byte by byte.

A row is cut into groups of neighbouring columns. All numbers are little-endian; d and m are float16.

TQ1_0   256 columns in 54 bytes: 1.69 bits a weight. 52 bytes hold five trits each (the last four bytes hold
        four), as digits of a fraction in base 3; then d. A weight is d * t.
TQ2_0   256 columns in 66 bytes: 2.06 bits. 64 bytes of four digits q = t + 1, two bits each; then d. Byte
        32 j + b has column 128 j + 32 i + b in bits 2 i and 2 i + 1.
Q2_0    64 columns in 18 bytes: 2.25 bits. d, then 16 bytes of four digits q = t + 1; byte b has column
        4 b + i in bits 2 i and 2 i + 1. The type has number 42, and llama.cpp reads it since June 2026;
        forks of it have 128 columns under the same number.
Q2_K    256 columns in 84 bytes: 2.63 bits. 16 bytes, each a 4-bit scale and a 4-bit minimum of 16 columns,
        which are all 1 here; 64 bytes of digits in the order of TQ2_0; d, m. A weight is d * q - m.
Q4_1    32 columns in 20 bytes: 5 bits. d, m, then 16 bytes; byte b has column b in its low four bits and
        column b + 16 in its high four. A weight is d * q + m.

The first three hold alpha * t exactly, with d = alpha. The others hold alpha * t + mu as
alpha * q + (mu - alpha), where the offset is rounded to float16; with mu = 0 they are exact too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from harness.export.source import Rounding, rounded_offset
from harness.runtimes.containers import GGUF_TYPES
from reference.types import TernaryMatrix

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class DataType:
    """Type of a tensor in a file: its name, its number there, and the columns and bytes of a group."""

    name: str
    number: int
    columns: int
    size: int
    file_type: int  # of a file most of whose matrices have the type
    shift: bool = False  # whether it stores mu - alpha

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row."""
        return columns // self.columns * self.size


def _known(name: str, file_type: int) -> DataType:
    columns, size = gguf.GGML_QUANT_SIZES[Type[name]]
    return DataType(name, Type[name], columns, size, file_type)


def _ternary() -> dict[str, DataType]:
    # By number and not by gguf's names, as gguf 0.19.0 does not know Q2_0.
    numbers = {"TQ1_0": (34, 36), "TQ2_0": (35, 37), "Q2_0": (42, 41), "Q2_K": (10, 10), "Q4_1": (3, 3)}
    return {
        held.name: DataType(held.name, number, held.columns, held.size, file_type, held.shift)
        for held in GGUF_TYPES
        for number, file_type in [numbers[held.name]]
    }


TERNARY = _ternary()
PLAIN = {name: _known(name, number) for name, number in (("F32", 0), ("F16", 1), ("BF16", 32))}
# What embedding and head can be rounded to.
EMBEDDING = {"F16": PLAIN["F16"], "Q8_0": _known("Q8_0", 7), "Q6_K": _known("Q6_K", 18)}


def pack(matrix: TernaryMatrix, kind: str, name: str, rounding: Rounding) -> Bytes:
    """Encode a matrix.

    Parameters
    ----------
    matrix : TernaryMatrix
        (n, m) in the original order, every group of the type within one block.
    kind : str
        Name of the type; "F32" for dense weights.
    name : str
        Name of the layer, for error messages.
    rounding : Rounding
        The rounding errors of the matrix are added to it.

    Returns
    -------
    (n, bytes of a row) uint8

    Raises
    ------
    UserError
        If mu - alpha overflows float16.
    """
    if kind == "F32":
        return dense(matrix).astype("<f4").view(np.uint8)
    stored, (n, m) = TERNARY[kind], matrix.trits.shape
    block = np.arange(0, m, stored.columns) // matrix.block_size  # of every group
    grid = [matrix.scale[:, block, None]]
    if stored.shift:
        grid.append(rounded_offset(matrix, name, f"in which {kind} stores it", rounding)[:, block, None])
    packed = _PACKERS[kind](matrix.trits.reshape(n, -1, stored.columns), *map(_halves, grid))
    return packed.reshape(n, stored.row_bytes(m))


def dense(matrix: TernaryMatrix) -> NDArray[np.float32]:
    """The weights float32(alpha) * t + float32(mu) of a matrix in the original order."""
    m = matrix.trits.shape[1]
    alpha, mu = (
        np.repeat(grid.astype(np.float32), matrix.block_size, axis=1)[:, :m]
        for grid in (matrix.scale, matrix.shift)
    )
    return alpha * matrix.trits + mu


def _halves(values: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(values, dtype="<f2").view(np.uint8)


def _digits(trits: NDArray[np.int8], *shape: int) -> Bytes:
    """q = t + 1, each group in the given shape."""
    return (trits + 1).astype(np.uint8).reshape(*trits.shape[:2], *shape)


def _pairs_of_bits(digits: Bytes) -> Bytes:
    """Put four digits into a byte; the axis before the last counts them."""
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(digits << shifts, axis=-2)


def _k_digits(trits: NDArray[np.int8]) -> Bytes:
    return _pairs_of_bits(_digits(trits, 2, 4, 32)).reshape(*trits.shape[:2], 64)


def _tq1_0(trits: NDArray[np.int8], d: Bytes) -> Bytes:
    unit = gguf.quants.quantize(trits.astype(np.float32), Type.TQ1_0)  # ends with a scale of 1 or 0
    return np.concatenate([unit[..., : -d.shape[-1]], d], axis=-1)


def _tq2_0(trits: NDArray[np.int8], d: Bytes) -> Bytes:
    return np.concatenate([_k_digits(trits), d], axis=-1)


def _q2_0(trits: NDArray[np.int8], d: Bytes) -> Bytes:
    return np.concatenate([d, _pairs_of_bits(_digits(trits, 16, 4).swapaxes(-1, -2))], axis=-1)


def _q2_k(trits: NDArray[np.int8], d: Bytes, offset: Bytes) -> Bytes:
    ones = np.full((*trits.shape[:2], 16), 0x11, dtype=np.uint8)
    minimum = _halves(-offset.view("<f2"))
    return np.concatenate([ones, _k_digits(trits), d, minimum], axis=-1)


def _q4_1(trits: NDArray[np.int8], d: Bytes, offset: Bytes) -> Bytes:
    digits = _digits(trits, 2, 16)
    return np.concatenate([d, offset, digits[..., 0, :] | digits[..., 1, :] << 4], axis=-1)


_PACKERS: dict[str, Callable[..., Bytes]] = {
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "Q2_0": _q2_0,
    "Q2_K": _q2_k,
    "Q4_1": _q4_1,
}
