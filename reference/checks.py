"""Refusals: input that no equation is defined for is a ValueError that says what and where."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Trits = NDArray[np.int8]

# A Gram matrix summed from float32 products is symmetric only to rounding.
SYMMETRY_TOLERANCE = 1e-6


def matrix(value: ArrayLike, name: str) -> Floats:
    """`value` as a finite, two-dimensional float64 array; `name` is what the error calls it."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be real numbers, got dtype {array.dtype}")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must be a non-empty matrix, got shape {array.shape}")
    array = array.astype(np.float64, copy=False)
    if not np.isfinite(array).all():
        row, column = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(f"{name}[{row}, {column}] is {array[row, column]}; all values must be finite")
    return array


def trits(value: ArrayLike, shape: tuple[int, ...], name: str = "T") -> Trits:
    """`value` as an int8 array of -1, 0 and +1 of the given shape."""
    array = np.asarray(value)
    same_shape(name, array, shape)
    if not ((array == -1) | (array == 0) | (array == 1)).all():
        raise ValueError(f"{name} must hold only -1, 0 and +1")
    return array.astype(np.int8, copy=False)


def column(value: ArrayLike, rows: int, name: str) -> Floats:
    """`value` as a finite (rows, 1) float64 array."""
    array = matrix(value, name)
    same_shape(name, array, (rows, 1))
    return array


def blocks(value: ArrayLike, shape: tuple[int, ...], block_size: int, name: str) -> Floats:
    """`value` as a finite float64 array with a number for every row and block of a matrix of this shape."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    array = matrix(value, name)
    same_shape(name, array, (shape[0], -(-shape[1] // block_size)))
    return array


def gram(value: ArrayLike, columns: int, name: str = "C") -> Floats:
    """`value` as a symmetric (columns, columns) matrix with a diagonal that is not negative."""
    array = matrix(value, name)
    same_shape(name, array, (columns, columns))
    if (np.diag(array) < 0).any():
        j = int(np.argmin(np.diag(array)))
        raise ValueError(f"{name}[{j}, {j}] = {array[j, j]}; the diagonal of a Gram matrix is not negative")
    asymmetry = np.abs(array - array.T).max()
    if asymmetry > SYMMETRY_TOLERANCE * np.abs(array).max():
        raise ValueError(f"{name} is not symmetric: |{name} - {name}ᵀ| reaches {asymmetry:.3g}")
    return array


def same_shape(name: str, array: Any, shape: tuple[int, ...]) -> None:
    """Refuse an array of another shape."""
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
