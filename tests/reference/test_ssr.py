"""Eq. 14-16: structural-similarity reordering."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.ssr import block_variance, cosine_similarity, permute, select_block
from tests.reference.strategies import dyadic_matrices, fractions


def signed_squared_cosine(column, mean):
    """Rises with the cosine and is exact: cos |cos|, without the length of the mean."""
    dot = sum(a * b for a, b in zip(column, mean, strict=True))
    return dot * abs(dot) / sum(a * a for a in column)


def select_exactly(W, k):
    rows = fractions(W)
    columns = list(zip(*rows, strict=True))
    mean = [sum(row) / len(row) for row in rows]
    keys = [signed_squared_cosine(c, mean) if any(c) else -math.inf for c in columns]
    ranked = sorted(range(len(columns)), key=lambda j: (-keys[j], j))
    return sorted(ranked[:k]), keys


@given(dyadic_matrices(max_columns=10), st.integers(1, 12))
def test_selected_columns_are_the_top_k_of_exact_arithmetic(W, k):
    expected, keys = select_exactly(W, k)
    got = select_block(W, k).tolist()
    if got != expected:
        # Exactly equal cosines of columns that are not multiples of each other by a power of two may
        # be one rounding apart in float64, in either direction.
        got_keys, expected_keys = (sorted(float(keys[j]) for j in chosen) for chosen in (got, expected))
        scale = max(abs(float(key)) for key in keys if key != -math.inf)
        np.testing.assert_allclose(got_keys, expected_keys, rtol=0, atol=1e-14 * scale)
    assert got == sorted(set(got))
    assert len(got) == min(k, W.shape[1])


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_no_other_subset_is_more_similar(k):
    W = np.random.default_rng(k).normal(size=(6, 9)) + 0.5
    mean = W.mean(axis=1)
    cosines = [W[:, j] @ mean / math.sqrt((W[:, j] @ W[:, j]) * (mean @ mean)) for j in range(9)]
    best = max(combinations(range(9), k), key=lambda subset: sum(cosines[j] for j in subset))
    assert select_block(W, k).tolist() == list(best)


@pytest.mark.parametrize("rows", [1, 2, 5, 17, 64])
@pytest.mark.parametrize("columns", [2, 5, 13, 33])
def test_ties_go_to_the_lower_index(rows, columns):
    column = np.random.default_rng(rows).normal(size=(rows, 1))
    equal = np.repeat(column, columns, axis=1)
    # A power of two changes the length of a column but not one digit of its direction.
    scaled = equal * 2.0 ** (np.arange(columns) % 5)
    for W in (equal, scaled, np.asfortranarray(equal)):
        for k in (1, columns // 2, columns):
            assert select_block(W, k).tolist() == list(range(k))


def test_similarity_is_signed():
    # The mean points along (1, 0); the last column is its opposite, the third at a right angle.
    W = np.array([[4.0, 2.0, 0.0, -1.0], [0.0, 1.0, -1.0, 0.0]])
    ranked = [select_block(W, k).tolist() for k in (1, 2, 3)]
    assert ranked == [[0], [0, 1], [0, 1, 2]]


def test_zero_columns_come_last_even_behind_opposite_ones():
    W = np.array([[0.0, 3.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    assert select_block(W, 1).tolist() == [1]
    assert select_block(W, 2).tolist() == [1, 3]
    assert select_block(W, 3).tolist() == [0, 1, 3]


def test_columns_that_cancel_are_all_equally_similar():
    W = np.array([[1.0, -1.0, 2.0, -2.0], [3.0, -3.0, 1.0, -1.0]])
    assert select_block(W, 2).tolist() == [0, 1]
    assert select_block(np.zeros((2, 4)), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("k", [0, -1])
def test_block_of_no_columns_is_refused(k):
    with pytest.raises(ValueError, match="k must be at least 1"):
        select_block(np.ones((2, 2)), k)


@given(dyadic_matrices(), st.integers(-20, 20), st.randoms(use_true_random=False))
def test_rows_in_another_order_or_scaled_choose_the_same(W, exponent, random):
    assert np.array_equal(select_block(W * 2.0**exponent, 2), select_block(W, 2))
    order = list(range(len(W)))
    random.shuffle(order)
    # The sums run in another order, so what was a tie may not be one: compare the similarities.
    _, keys = select_exactly(W, 2)
    finite = [abs(float(key)) for key in keys if key != -math.inf]
    moved, plain = (sorted(float(keys[j]) for j in select_block(A, 2)) for A in (W[order], W))
    np.testing.assert_allclose(moved, plain, rtol=0, atol=1e-14 * max(finite, default=0))


@given(dyadic_matrices(max_columns=6))
def test_cosines_are_those_of_their_definition(W):
    S = cosine_similarity(W)
    for i, j in np.ndindex(S.shape):
        a, b = W[:, i].tolist(), W[:, j].tolist()
        lengths = math.hypot(*a) * math.hypot(*b)
        expected = math.fsum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0
        # Values of at most 1 from a handful of roundings.
        assert S[i, j] == pytest.approx(expected, abs=4e-15)


@given(st.integers(1, 9), st.randoms(use_true_random=False))
def test_permuting_both_leaves_the_product(columns, random):
    order = list(range(columns))
    random.shuffle(order)
    rng = np.random.default_rng(columns)
    # Products of small integers are exact in any order.
    W = rng.integers(-50, 50, size=(3, columns)).astype(float)
    X = rng.integers(-50, 50, size=(4, columns)).astype(float)
    P = np.zeros((columns, columns))
    P[order, range(columns)] = 1
    assert np.array_equal(permute(W, order), W @ P)
    assert np.array_equal(permute(X, order) @ permute(W, order).T, X @ W.T)


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 3], [0, 1, 1], [-1, 0, 1], [[0, 1, 2]]])
def test_what_is_no_permutation_is_refused(order):
    with pytest.raises(ValueError, match="permutation"):
        permute(np.ones((2, 3)), order)


@given(dyadic_matrices(), st.integers(1, 10))
def test_block_variance_is_the_mean_squared_distance_from_the_block_mean(W, block_size):
    total = Fraction(0)
    for row in fractions(W):
        for first in range(0, len(row), block_size):
            block = row[first : first + block_size]
            mean = sum(block) / len(block)
            total += sum((w - mean) ** 2 for w in block)
    # Squares of at most 16 from a few roundings each.
    assert block_variance(W, block_size) == pytest.approx(float(total / W.size), rel=1e-13, abs=1e-14)


def test_block_variance_needs_a_block_size():
    with pytest.raises(ValueError, match="block_size"):
        block_variance(np.ones((2, 2)), 0)
