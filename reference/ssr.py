"""Structural-similarity reordering, Section 3.3 (Eq. 14-16): which columns share a block."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reference import checks
from reference.checks import Floats

Indices = NDArray[np.intp]


def permute(A: ArrayLike, permutation: ArrayLike) -> Floats:
    """Reorder columns, ``A P`` (Eq. 14).

    Parameters
    ----------
    A : (rows, m) array_like
        Weights W or inputs X.
    permutation : (m,) array_like of int
        Column j of the result is column ``permutation[j]`` of A.

    Returns
    -------
    (rows, m) float64
        ``permute(X, p) @ permute(W, p).T`` equals ``X @ W.T``.

    Raises
    ------
    ValueError
        If A is not a finite matrix or `permutation` is not one of its columns.
    """
    A = checks.matrix(A, "A")
    order = np.asarray(permutation)
    if order.shape != (A.shape[1],) or not np.array_equal(np.sort(order), np.arange(A.shape[1])):
        raise ValueError(f"permutation must hold every index from 0 to {A.shape[1] - 1} once")
    return A[:, order.astype(np.intp)]


def cosine_similarity(W: ArrayLike) -> Floats:
    r"""Cosine of the angle between every two columns of W (Eq. 15).

    Parameters
    ----------
    W : (n, m) array_like
        Weights.

    Returns
    -------
    S : (m, m) float64
        :math:`S_{ij} = W_{:,i}^T W_{:,j} / (\|W_{:,i}\| \|W_{:,j}\|)`; 0 where a column is zero.

    Raises
    ------
    ValueError
        If W is not a non-empty, finite matrix.
    """
    unit = _unit_columns(checks.matrix(W, "W"))
    return unit.T @ unit


def select_block(W: ArrayLike, k: int) -> Indices:
    r"""The k columns most similar to the mean column of what remains (Eq. 16).

    Parameters
    ----------
    W : (n, r) array_like
        The remaining columns, after compensation.
    k : int
        Columns wanted; all of them if fewer remain.

    Returns
    -------
    indices : (min(k, r),) intp
        Ascending. Similarity is the signed cosine; ties go to the lower index, and zero columns,
        which have no direction, come last.

    Raises
    ------
    ValueError
        If W is not a non-empty, finite matrix or k is not positive.

    Notes
    -----
    :math:`\mathcal B = \text{Top-}k \{ W_{:,i}^T \bar w / (\|W_{:,i}\| \|\bar w\|) \}` with
    :math:`\bar w` the mean of the remaining columns. A factor common to all columns does not change
    their order, so :math:`\|\bar w\|` is left out; it is 0 where the columns cancel, and then every
    similarity is 0.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    W = checks.matrix(W, "W")
    # Not a matrix product: that may round equal columns differently, and a tie would not be one.
    similarity = (_unit_columns(W) * W.mean(axis=1, keepdims=True)).sum(axis=0)
    similarity[~W.any(axis=0)] = -np.inf
    best = np.argsort(-similarity, kind="stable")[:k]
    return np.sort(best)


def block_variance(W: ArrayLike, block_size: int) -> float:
    """Mean over rows and blocks of the variance of the weights in a block (Fig. 3, right).

    Parameters
    ----------
    W : (n, m) array_like
        Weights, columns in quantization order.
    block_size : int
        Columns in a block; the last block may have fewer.

    Returns
    -------
    float
        Every block of a row counts by its number of columns.

    Raises
    ------
    ValueError
        If W is not a non-empty, finite matrix or block_size is not positive.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    W = checks.matrix(W, "W")
    blocks = np.split(W, range(block_size, W.shape[1], block_size), axis=1)
    return sum(float(b.var(axis=1).mean()) * b.shape[1] for b in blocks) / W.shape[1]


def _unit_columns(W: Floats) -> Floats:
    norms = np.linalg.norm(W, axis=0)
    return W / np.where(norms == 0, 1.0, norms)
