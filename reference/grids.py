"""What a checkpoint stores of alpha and mu in 8 bits; the paper leaves it open.

Both vary between rows by the rows' size and between blocks by what compensation has done, so a value is
the product of a factor of the row, one of the block, and a code. The row's factor is known before the
first block, and the block's when the block is fitted, so that the error which is passed on is that of
what is stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from reference import checks
from reference.checks import Floats
from reference.types import CODE_LIMIT, CodedGrid


def row_factor(W: ArrayLike) -> np.ndarray:
    """The factor of every row: the root mean square of its weights.

    Parameters
    ----------
    W : (n, m) array_like
        Weights.

    Returns
    -------
    (n, 1) float16

    Raises
    ------
    ValueError
        If W is not a finite matrix, or a factor is beyond what float16 holds.
    """
    W = checks.matrix(W, "W")
    size = np.sqrt(np.square(W).mean(axis=1, keepdims=True))
    with np.errstate(over="ignore"):
        factor = size.astype(np.float16)
    if not np.isfinite(factor).all():
        row = int(np.argmax(size))
        raise ValueError(
            f"the weights of row {row} have a root mean square of {size[row, 0]:.6g}, beyond float16"
        )
    return factor


def encode(value: ArrayLike, row: np.ndarray) -> CodedGrid:
    """alpha or mu of one block in 8 bits.

    Parameters
    ----------
    value : (n, 1) array_like
        Values of the block.
    row : (n, 1) float16
        Factors of the rows; where one is 0 the value is taken to be 0.

    Returns
    -------
    CodedGrid
        Of one block: every value to the nearest of 255 that its row has there. The row that needs
        most has them up to its value, but for the rounding of the factor to float16.

    Raises
    ------
    ValueError
        If a value is not finite, or the factor of the block is beyond what float16 holds.
    """
    row = np.asarray(row)
    value = checks.column(value, len(row), "value")
    share = np.divide(value, row, out=np.zeros_like(value), where=row != 0)
    with np.errstate(over="ignore"):
        block = (np.abs(share).max(keepdims=True) / CODE_LIMIT).astype(np.float16)
    if not np.isfinite(block).all():
        raise ValueError(f"a value is {np.abs(share).max():.6g} times its row's weights, beyond float16")
    codes = np.rint(np.divide(share, block, out=np.zeros_like(share), where=block != 0))
    return CodedGrid(np.clip(codes, -CODE_LIMIT, CODE_LIMIT).astype(np.int8), row, block)


class Stored:
    """alpha or mu of the blocks so far, as a checkpoint holds it: float16, or coded with factors of rows."""

    def __init__(self, name: str, row: np.ndarray | None) -> None:
        self.name = name
        self.row = row
        self.columns: list[np.ndarray] = []
        self.factors: list[np.ndarray] = []

    def add(self, value: Floats) -> np.ndarray:
        """Take in a block (n, 1), and give its values as they are read back, in float32."""
        if self.row is None:
            stored = self._float16(value)
            self.columns.append(stored)
            return stored.astype(np.float32)
        coded = encode(value, self.row)
        self.columns.append(coded.codes)
        self.factors.append(coded.block)
        return coded.decode()

    def grid(self) -> Any:
        """All blocks."""
        columns = np.hstack(self.columns)
        return columns if self.row is None else CodedGrid(columns, self.row, np.hstack(self.factors))

    def _float16(self, value: Floats) -> np.ndarray:
        with np.errstate(over="ignore"):
            stored = value.astype(np.float16)
        if not np.isfinite(stored).all():
            row = int(np.argmin(np.isfinite(stored[:, 0])))
            raise ValueError(
                f"the {self.name} of row {row}, block {len(self.columns)} is {value[row, 0]:.6g}, "
                "beyond what float16 holds"
            )
        return stored
