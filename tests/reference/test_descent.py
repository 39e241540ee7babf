"""Coordinate descent, against all changes of a trit, and all trits of a short row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.descent import LAZY_COLUMNS, MARGIN, descend
from reference.joint import whole_error
from tests.reference.strategies import assignments, quadratic_error, random_gram
from tests.reference.test_joint import dequantized, rows

# Enough for these small rows to settle.
SWEEPS = 100


@given(rows())
def test_it_ends_where_no_change_of_one_trit_gains(case):
    W, T, alpha, mu, H, k = case
    settled = descend(W, T, alpha, mu, H, k, SWEEPS)
    assert settled.dtype == np.int8
    for i, w in enumerate(W):
        here = quadratic_error(
            w[None], dequantized(settled[i : i + 1], alpha[i : i + 1], mu[i : i + 1], k), H
        )
        for j in range(len(w)):
            for t in (-1, 0, 1):
                changed = settled[i : i + 1].copy()
                changed[0, j] = t
                W_hat = dequantized(changed, alpha[i : i + 1], mu[i : i + 1], k)
                gain = here - quadratic_error(w[None], W_hat, H)
                assert gain <= MARGIN * alpha[i, j // k] ** 2 * H[j, j] + 1e-12 * (1 + here)


@given(rows(max_columns=6))
def test_short_rows_come_near_the_best_of_all_assignments(case):
    """Never below the best of all 3^m, and there at once if a descent from it is begun."""
    W, T, alpha, mu, H, k = case
    settled = descend(W, T, alpha, mu, H, k, SWEEPS)
    for i, w in enumerate(W):
        row = slice(i, i + 1)
        every = assignments(len(w))
        errors = np.array(
            [quadratic_error(w[None], dequantized(t[None], alpha[row], mu[row], k), H) for t in every]
        )
        best = every[errors.argmin()][None]
        slack = 1e-10 * (1 + errors.max())
        assert (
            errors.min() <= whole_error(w[None], dequantized(settled[row], alpha[row], mu[row], k), H) + slack
        )
        stays = descend(w[None], best, alpha[row], mu[row], H, k, SWEEPS)
        assert whole_error(w[None], dequantized(stays, alpha[row], mu[row], k), H) <= errors.min() + slack


@given(rows(), st.integers(0, 3))
def test_error_never_rises_from_sweep_to_sweep(case, sweeps):
    W, T, alpha, mu, H, k = case
    before = whole_error(W, dequantized(descend(W, T, alpha, mu, H, k, sweeps), alpha, mu, k), H)
    after = whole_error(W, dequantized(descend(W, T, alpha, mu, H, k, sweeps + 1), alpha, mu, k), H)
    assert after <= before * (1 + 1e-12) + 1e-12
    if not sweeps:
        assert np.array_equal(descend(W, T, alpha, mu, H, k, 0), T)


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_uncoupled_columns_are_rounded_to_the_nearest(seed, negative):
    rng = np.random.default_rng(seed)
    W, T = rng.normal(size=(3, 8)), rng.integers(-1, 2, size=(3, 8))
    alpha, mu = rng.uniform(0.5, 1.5, size=(3, 2)), rng.normal(size=(3, 2))
    alpha = -alpha if negative else alpha
    moved = descend(W, T, alpha, mu, np.diag(rng.uniform(0.1, 9, size=8)), 4)
    values = np.stack([dequantized(np.full((3, 8), t), alpha, mu, 4) for t in (-1, 0, 1)])
    assert np.array_equal(moved, np.abs(values - W).argmin(axis=0) - 1)


def test_rows_without_scale_and_dead_inputs_keep_their_trits():
    rng = np.random.default_rng(1)
    W, T, H = rng.normal(size=(2, 6)), rng.integers(-1, 2, size=(2, 6)), random_gram(rng, 6, "dead")
    alpha = np.array([[0.0, 0.0], [1.0, 0.0]])
    moved = descend(W, T, alpha, np.zeros((2, 2)), H, 3)
    assert np.array_equal(moved[0], T[0])
    assert np.array_equal(moved[1, 3:], T[1, 3:])
    dead = np.diag(H) == 0
    assert dead.any()
    moved = descend(W, T, np.ones((2, 2)), np.zeros((2, 2)), H, 3)
    assert np.array_equal(moved[:, dead], T[:, dead])


def test_a_step_that_changes_nothing_is_not_taken():
    """Half-way between two trits both cost the same: none of them moves."""
    W = np.array([[0.5, 0.5, -0.5, -0.5]])
    for T in ([[0, 1, 0, -1]], [[1, 0, -1, 0]]):
        assert descend(W, T, [[1.0]], [[0.0]], np.eye(4), 4).tolist() == T


@pytest.mark.parametrize("alpha", [1.0, -8.0])
@pytest.mark.parametrize("weight", [1.0, 2.0**-9])
def test_a_trit_moves_for_more_than_the_margin(alpha, weight):
    """A step of d from t = 0 with w = (½ + δ) α gains 2 δ α² H, and the margin is 1e-7 α² H."""
    for share, t in ((0.49e-7, 0), (0.51e-7, 1)):
        assert descend([[(0.5 + share) * alpha]], [[0]], [[alpha]], [[0.0]], [[weight]], 1).tolist() == [[t]]


def test_there_are_eight_sweeps_unless_told_otherwise():
    """A move makes that of the column before it worth while, which only the next sweep comes to."""
    H = np.eye(12) + 0.4 * (np.eye(12, k=1) + np.eye(12, k=-1))
    g = 0.3 * (-1.0) ** np.arange(12)
    g[-1] = -0.7
    start = [np.linalg.solve(H, g)], np.zeros((1, 12)), [[1.0]], [[0.0]], H, 12
    for sweeps in range(13):
        assert np.abs(descend(*start, sweeps)).tolist() == [[0] * (12 - sweeps) + [1] * sweeps]
    assert np.array_equal(descend(*start), descend(*start, 8))


def test_rows_do_not_disturb_each_other():
    """Not even a row whose step is not taken, beside one that moves in the same column."""
    H = [[1.0, 0.5], [0.5, 1.0]]
    # g = (-½, -17/32): for the first trit 1 and 0 are equal, so it stays, and the second goes to -1.
    W, T = [[11 / 16, -3 / 8], [-1, 0]], [[1, 0], [1, 0]]
    assert descend(W, T, np.ones((2, 1)), np.zeros((2, 1)), H, 2).tolist() == [[1, -1], [-1, 0]]


def test_gradients_of_lazy_columns_are_those_of_all():
    """Moves in one batch of columns reach the columns of every other: compare with one column at a time."""
    rng = np.random.default_rng(2)
    m = 2 * LAZY_COLUMNS + 5
    n = 12
    W, T, H = rng.normal(size=(n, m)), rng.integers(-1, 2, size=(n, m)), random_gram(rng, m)
    H = H + 50  # every input tells of every other
    alpha, mu = np.full((n, 3), 0.7), np.zeros((n, 3))
    expected = T.copy()
    for _ in range(2):
        for i in range(n):
            for j in range(m):
                g = (W[i] - 0.7 * expected[i]) @ H[:, j]
                t = np.clip(np.rint(expected[i, j] + g / (0.7 * H[j, j])), -1, 1)
                d = 0.7 * (t - expected[i, j])
                if d * (d * H[j, j] - 2 * g) < -MARGIN * 0.49 * H[j, j]:
                    expected[i, j] = t
    assert np.array_equal(descend(W, T, alpha, mu, H, LAZY_COLUMNS, 2), expected)
    assert (expected != T).mean() > 0.1


def test_input_is_left_alone():
    T = np.zeros((1, 3), np.int8)
    assert descend([[1.0, 1.0, -1.0]], T, [[1.0]], [[0.0]], np.eye(3), 3).tolist() == [[1, 1, -1]]
    assert not T.any()


def test_negative_sweeps_are_refused():
    with pytest.raises(ValueError, match="sweeps must not be negative, got -1"):
        descend([[1.0]], [[0]], [[1.0]], [[0.0]], [[1.0]], 1, -1)
