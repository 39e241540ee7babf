"""Eq. 1-3: symmetric ternarization."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reference.twn import symmetric_ternarize
from tests.reference.strategies import dyadic_matrices, fractions


@given(dyadic_matrices(max_columns=12))
def test_threshold_and_scale_are_those_of_exact_arithmetic(W):
    alpha, T = symmetric_ternarize(W)
    for i, row in enumerate(fractions(W)):
        delta = Fraction(3, 4) * sum(map(abs, row)) / len(row)
        # A weight that equals the threshold in exact arithmetic may fall on either side in float64.
        assume(all(abs(w) != delta for w in row if w))
        trits = [(w > delta) - (w < -delta) for w in row]
        kept = sum(map(abs, trits))
        expected = sum(t * w for t, w in zip(trits, row, strict=True)) / kept if kept else 0
        assert T[i].tolist() == trits
        # Sums of multiples of 1/64 are exact; only the division rounds.
        assert alpha[i, 0] == float(expected)


def test_weight_at_the_threshold_is_zero():
    # Mean magnitude 4, so the threshold is exactly 3 in float64 as well.
    alpha, T = symmetric_ternarize([[3.0, -3.0, 5.0, -5.0]])
    assert T.tolist() == [[0, 0, 1, -1]]
    assert alpha.tolist() == [[5.0]]


@given(dyadic_matrices())
def test_scale_is_the_least_squares_fit_to_the_trits(W):
    alpha, T = symmetric_ternarize(W)
    for i in np.flatnonzero(T.any(axis=1)):
        fit = np.linalg.lstsq(T[i][:, None].astype(float), W[i], rcond=None)[0]
        # lstsq on one column of at most 12 entries is good to a few roundings.
        assert alpha[i, 0] == pytest.approx(fit[0], rel=1e-13)


def test_zero_row_has_zero_scale_and_trits():
    alpha, T = symmetric_ternarize([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert alpha.tolist() == [[0.0], [1.0]]
    assert T.tolist() == [[0, 0, 0], [1, 1, 1]]


def test_single_weight():
    alpha, T = symmetric_ternarize([[-2.5]])
    assert (alpha.item(), T.item()) == (2.5, -1)


def test_shapes_and_types():
    alpha, T = symmetric_ternarize(np.arange(6).reshape(2, 3))
    assert alpha.shape == (2, 1)
    assert alpha.dtype == np.float64
    assert T.shape == (2, 3)
    assert T.dtype == np.int8


@given(dyadic_matrices(max_rows=4), st.integers(-30, 30), st.randoms(use_true_random=False))
def test_rows_are_independent_and_powers_of_two_scale_exactly(W, exponent, random):
    alpha, T = symmetric_ternarize(W)
    order = list(range(len(W)))
    random.shuffle(order)
    moved_alpha, moved_T = symmetric_ternarize(W[order] * 2.0**exponent)
    # Multiplying by a power of two changes no mantissa.
    assert np.array_equal(moved_alpha, alpha[order] * 2.0**exponent)
    assert np.array_equal(moved_T, T[order])


@given(dyadic_matrices())
def test_opposite_weights_have_opposite_trits(W):
    alpha, T = symmetric_ternarize(W)
    negated_alpha, negated_T = symmetric_ternarize(-W)
    assert np.array_equal(negated_alpha, alpha)
    assert np.array_equal(negated_T, -T)
