"""Structural-similarity reordering, Section 3.3 (Eq. 14-16); see `reference.ssr`."""

from __future__ import annotations

import numpy as np

from gpu import checks
from gpu.device import Array, xp
from gpu.kernels.similarity import choose_columns, compare_columns

# Weights whose variance is taken at a time: few launches, and little beside the matrix.
VARIANCE_ELEMENTS = 1 << 21


def permute(A: Array, permutation: Array) -> Array:
    """Reorder columns, ``A P`` (Eq. 14).

    Parameters
    ----------
    A : (rows, m) float32 or float64
        Weights W or inputs X.
    permutation : (m,) array of int
        Column j of the result is column ``permutation[j]`` of A.

    Returns
    -------
    (rows, m) array

    Raises
    ------
    ValueError
        If A is not a finite matrix or `permutation` is not one of its columns.
    """
    A = checks.matrix(A, "A")
    order = xp.asarray(permutation)
    if order.shape != (A.shape[1],) or not (xp.sort(order) == xp.arange(A.shape[1])).all():
        raise ValueError(f"permutation must hold every index from 0 to {A.shape[1] - 1} once")
    return A[:, order.astype(np.intp)]


def cosine_similarity(W: Array) -> Array:
    """Cosine of the angle between every two columns of W (Eq. 15).

    Parameters
    ----------
    W : (n, m) float32 or float64
        Weights.

    Returns
    -------
    S : (m, m) float64
        0 where a column is zero.

    Raises
    ------
    ValueError
        If W is not a non-empty, finite matrix.
    """
    W = checks.matrix(W, "W").astype(np.float64, copy=False)
    norms = xp.sqrt(xp.square(W).sum(axis=0))
    unit = W / xp.where(norms == 0, 1.0, norms)
    return unit.T @ unit


def select_block(W: Array, k: int) -> Array:
    """The k columns most similar to the mean column of what remains (Eq. 16).

    Parameters
    ----------
    W : (n, r) float32 or float64
        The remaining columns, after compensation.
    k : int
        Columns wanted; all of them if fewer remain.

    Returns
    -------
    indices : (min(k, r),) int64
        Ascending. Ties go to the lower index, and zero columns come last.

    Raises
    ------
    ValueError
        If W is not a non-empty, finite matrix or k is not positive.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    W = checks.matrix(W, "W")
    return most_similar(W, xp.ones(W.shape[1], bool), min(k, W.shape[1]))


def most_similar(W: Array, remaining: Array, k: int) -> Array:
    """`select_block` among at least k columns of W that a mask names; the others of W must be zero."""
    return choose_columns(compare_columns(W, remaining), k)


def block_variance(W: Array, block_size: int) -> float:
    """Mean over rows and blocks of the variance of the weights in a block (Fig. 3, right).

    Parameters
    ----------
    W : (n, m) float32 or float64
        Weights, columns in quantization order.
    block_size : int
        Columns in a block; the last block may have fewer.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If W is not a non-empty, finite matrix or block_size is not positive.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    W = checks.matrix(W, "W")
    n, m = W.shape
    whole = m // block_size * block_size
    rows = -(-VARIANCE_ELEMENTS // m)
    total = xp.zeros(())
    for first in range(0, n, rows):
        # Not `var(dtype=...)`, for which CuPy takes the mean in the type of W.
        slab = W[first : first + rows].astype(np.float64)
        if whole:
            total += slab[:, :whole].reshape(len(slab), -1, block_size).var(axis=2).sum() * block_size
        if whole < m:
            total += slab[:, whole:].var(axis=1).sum() * (m - whole)
    return float(total) / (n * m)
