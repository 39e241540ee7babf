"""Refuse invalid device arrays, in the same cases as `reference.checks`.

The host knows shapes and dtypes, but checking values makes it wait for the device. So `ternarize` checks its
arguments once, and the functions in its loop over blocks check nothing.
"""

from __future__ import annotations

import numpy as np

from gpu.device import Array, xp
from gpu.twin import twin
from reference.checks import SYMMETRY_TOLERANCE


@twin
def matrix(value: Array, name: str) -> Array:
    """float32 arrays stay float32."""
    array = xp.asarray(value)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be real numbers, got dtype {array.dtype}")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must be a non-empty matrix, got shape {array.shape}")
    if array.dtype != np.float32:
        array = array.astype(np.float64, copy=False)
    finite = xp.isfinite(array)
    if not finite.all():
        row, column = (int(index[0]) for index in xp.nonzero(~finite))
        raise ValueError(f"{name}[{row}, {column}] is {float(array[row, column])}; all values must be finite")
    return array


@twin
def trits(value: Array, shape: tuple[int, ...], name: str = "T") -> Array:
    array = xp.asarray(value)
    same_shape(name, array, shape)
    if not ((array == -1) | (array == 0) | (array == 1)).all():
        raise ValueError(f"{name} must hold only -1, 0 and +1")
    return array.astype(np.int8, copy=False)


@twin
def column(value: Array, rows: int, name: str) -> Array:
    array = matrix(value, name)
    same_shape(name, array, (rows, 1))
    return array.astype(np.float64, copy=False)


@twin
def gram(value: Array, columns: int, name: str = "C") -> Array:
    array = matrix(value, name).astype(np.float64, copy=False)
    same_shape(name, array, (columns, columns))
    diagonal = xp.diagonal(array)
    if (diagonal < 0).any():
        j = int(xp.argmin(diagonal))
        raise ValueError(
            f"{name}[{j}, {j}] = {float(diagonal[j])}; the diagonal of a Gram matrix is not negative"
        )
    asymmetry = float(abs(array - array.T).max())
    if asymmetry > SYMMETRY_TOLERANCE * float(abs(array).max()):
        raise ValueError(f"{name} is not symmetric: |{name} - {name}ᵀ| reaches {asymmetry:.3g}")
    return array


@twin
def same_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
