"""Structural-similarity reordering, Section 3.3 (Eq. 14-16); see `reference.ssr`."""

from __future__ import annotations

import numpy as np

from gpu import checks
from gpu.device import Array, xp
from gpu.kernels.similarity import choose_columns, compare_columns
from gpu.twin import twin

# Weights in one slab of `block_variance`: enough for few launches, too few to fill the memory.
VARIANCE_ELEMENTS = 1 << 21


@twin
def permute(A: Array, permutation: Array) -> Array:
    """The result has the type of A, float32 or float64."""
    A = checks.matrix(A, "A")
    order = xp.asarray(permutation)
    if order.shape != (A.shape[1],) or not (xp.sort(order) == xp.arange(A.shape[1])).all():
        raise ValueError(f"permutation must hold every index from 0 to {A.shape[1] - 1} once")
    return A[:, order.astype(np.intp)]


@twin
def cosine_similarity(W: Array) -> Array:
    W = checks.matrix(W, "W").astype(np.float64, copy=False)
    norms = xp.sqrt(xp.square(W).sum(axis=0))
    unit = W / xp.where(norms == 0, 1.0, norms)
    return unit.T @ unit


@twin
def select_block(W: Array, k: int) -> Array:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    W = checks.matrix(W, "W")
    return most_similar(W, xp.ones(W.shape[1], bool), min(k, W.shape[1]))


def most_similar(W: Array, remaining: Array, k: int) -> Array:
    """Compute `select_block` of the columns in a mask, at least k; all other columns of W must be zero."""
    return choose_columns(compare_columns(W, remaining), k)


@twin
def block_variance(W: Array, block_size: int) -> float:
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    W = checks.matrix(W, "W")
    n, m = W.shape
    whole = m // block_size * block_size
    rows = -(-VARIANCE_ELEMENTS // m)
    total = xp.zeros(())
    for first in range(0, n, rows):
        # Not `var(dtype=...)`: CuPy would compute the mean in the dtype of W.
        slab = W[first : first + rows].astype(np.float64)
        if whole:
            total += slab[:, :whole].reshape(len(slab), -1, block_size).var(axis=2).sum() * block_size
        if whole < m:
            total += slab[:, whole:].var(axis=1).sum() * (m - whole)
    return float(total) / (n * m)
