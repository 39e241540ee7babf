"""Inputs that the tests share, and the plain arithmetic that answers are checked with."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
from hypothesis import strategies as st

EPS = float(np.finfo(np.float64).eps)
GRAM_KINDS = ("white", "correlated", "low rank", "outlier", "dead", "zero")


@st.composite
def dyadic_matrices(draw, max_rows=3, max_columns=8, limit=256):
    """Multiples of 1/64: the same number in float64 and as a fraction, with repeats and zeros."""
    rows = draw(st.integers(1, max_rows))
    columns = draw(st.integers(1, max_columns))
    values = st.lists(st.integers(-limit, limit), min_size=rows * columns, max_size=rows * columns)
    return np.array(draw(values), dtype=np.float64).reshape(rows, columns) / 64


@st.composite
def trits_like(draw, W):
    values = draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=W.size, max_size=W.size))
    return np.array(values, dtype=np.int8).reshape(W.shape)


@st.composite
def weights_and_trits(draw, **limits):
    W = draw(dyadic_matrices(**limits))
    return W, draw(trits_like(W))


@st.composite
def layers(draw, max_rows=4, max_columns=12):
    """Weights with an offset in every row, trits, and a Gram matrix of any kind a layer can have."""
    rows = draw(st.integers(1, max_rows))
    columns = draw(st.integers(1, max_columns))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    W = rng.normal(size=(rows, columns)) + rng.normal(size=(rows, 1))
    T = rng.integers(-1, 2, size=(rows, columns)).astype(np.int8)
    return W, T, random_gram(rng, columns, draw(st.sampled_from(GRAM_KINDS)))


def random_gram(rng, columns, kind="white"):
    tokens = 1 if kind == "low rank" else 2 * columns + 3
    X = rng.normal(size=(tokens, columns))
    if kind == "correlated":
        X = rng.normal(size=(tokens, 1)) @ rng.normal(size=(1, columns)) + 1e-3 * X
    if kind == "outlier":
        X[:, columns // 2] *= 100
    if kind == "dead":
        X[:, columns // 2] = 0
    if kind == "zero":
        X[:] = 0
    return X.T @ X


def fractions(values):
    """A float64 array as nested lists of exact fractions."""
    array = np.asarray(values)
    if array.ndim == 0:
        return Fraction(float(array))
    return [fractions(part) for part in array]


def assignments(columns):
    """All 3^columns rows of trits."""
    return np.array(list(product((-1, 0, 1), repeat=columns)), dtype=np.int8)


def quadratic_error(W, W_hat, C):
    """tr((W - W_hat) C (W - W_hat)^T), row by row from its definition."""
    E = np.asarray(W, dtype=np.float64) - W_hat
    return float(sum(e @ C @ e for e in E))


def square_root(C):
    """L with C = L L^T, also where C is singular."""
    values, vectors = np.linalg.eigh(C)
    # Which eigenvectors of eigenvalue 0 come back differs between BLAS kernels; a dead input is exactly dead.
    vectors = np.where(np.diag(C)[:, None] > 0, vectors, 0)
    return vectors * np.sqrt(np.maximum(values, 0))
