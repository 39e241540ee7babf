"""Eq. 4-10: asymmetric start, optimal grid, rounding, and the fitting that alternates the two."""

import inspect
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reference.atq import (
    build_optimal_grid,
    flexible_round,
    iterative_ternary_fitting,
    ternary_init,
    weight_error,
    weight_error_gradient,
)
from reference.types import TernaryConfig
from tests.reference.strategies import (
    EPS,
    assignments,
    dyadic_matrices,
    fractions,
    weights_and_trits,
)

exponents = st.integers(-20, 20)
shuffles = st.randoms(use_true_random=False)


def solve_normal_equations(w, t):
    """Eq. 8 by Cramer's rule on fractions; a row of equal trits has scale 0 and the mean for shift."""
    tt, t1, m = sum(x * x for x in t), sum(t), len(t)
    wt, w1 = sum(a * b for a, b in zip(w, t, strict=True)), sum(w)
    determinant = tt * m - t1 * t1
    if determinant == 0:
        return Fraction(0), w1 / m
    return (wt * m - w1 * t1) / determinant, (tt * w1 - t1 * wt) / determinant


def row_error(w, alpha, mu, t):
    return sum((a - (alpha * b + mu)) ** 2 for a, b in zip(w, t, strict=True))


@given(dyadic_matrices(max_columns=12))
def test_start_is_that_of_exact_arithmetic(W):
    alpha, mu, T = ternary_init(W)
    for i, row in enumerate(fractions(W)):
        mean = sum(row) / len(row)
        centred = [w - mean for w in row]
        delta = Fraction(3, 4) * sum(map(abs, centred)) / len(row)
        # At the threshold, and where all weights equal a mean that is no float64, rounding decides.
        assume(all(abs(w) != delta for w in centred))
        trits = [(w > delta) - (w < -delta) for w in centred]
        kept = [t * w for t, w in zip(trits, centred, strict=True) if t]
        assert T[i].tolist() == trits
        # Weights of at most 4 and their mean, a few roundings each.
        assert mu[i, 0] == pytest.approx(float(mean), abs=1e-14)
        assert alpha[i, 0] == pytest.approx(float(sum(kept) / len(kept)), abs=1e-14)


@given(weights_and_trits())
def test_weight_error_is_the_sum_of_squares(given):
    W, T = given
    alpha, mu = np.full((len(W), 1), 0.75), np.full((len(W), 1), -0.5)
    expected = sum(
        row_error(row, Fraction(3, 4), Fraction(-1, 2), t)
        for row, t in zip(fractions(W), T.tolist(), strict=True)
    )
    # Multiples of 1/4096 below 2^12: every sum is exact.
    assert weight_error(W, alpha, mu, T) == float(expected)


def test_gradient_agrees_with_finite_differences():
    rng = np.random.default_rng(3)
    W = rng.normal(size=(3, 7))
    T = rng.integers(-1, 2, size=W.shape)
    alpha, mu = rng.normal(size=(2, 3, 1))
    d_alpha, d_mu = weight_error_gradient(W, alpha, mu, T)
    h = 2.0**-10
    for i in range(3):
        step = np.zeros((3, 1))
        step[i] = h
        by_alpha = weight_error(W, alpha + step, mu, T) - weight_error(W, alpha - step, mu, T)
        by_mu = weight_error(W, alpha, mu + step, T) - weight_error(W, alpha, mu - step, T)
        # Central differences of a quadratic have no truncation error; rounding is eps·E_w/h, E_w < 100.
        assert d_alpha[i, 0] == pytest.approx(by_alpha / (2 * h), abs=1e-10)
        assert d_mu[i, 0] == pytest.approx(by_mu / (2 * h), abs=1e-10)


@given(weights_and_trits(max_columns=12), st.sampled_from([0, 1000, -(2**20)]))
def test_grid_solves_the_normal_equations_exactly(given, offset):
    W, T = given
    alpha, mu = build_optimal_grid(W + offset, T)
    for i, row in enumerate(fractions(W + offset)):
        expected_alpha, expected_mu = solve_normal_equations(row, T[i].tolist())
        # Centring rounds at the size of the offset, and the system multiplies that by at most m.
        tolerance = 12 * EPS * (8 + 4 * abs(offset))
        assert alpha[i, 0] == pytest.approx(float(expected_alpha), abs=tolerance)
        assert mu[i, 0] == pytest.approx(float(expected_mu), abs=tolerance)


def test_grid_is_the_dense_least_squares_fit():
    rng = np.random.default_rng(11)
    W = rng.normal(size=(20, 128)) + 0.3
    T = rng.integers(-1, 2, size=W.shape)
    alpha, mu = build_optimal_grid(W, T)
    for i in range(20):
        design = np.column_stack([T[i], np.ones(128)])
        fit = np.linalg.lstsq(design, W[i], rcond=None)[0]
        # 128 weights of size 1 and a system of condition below 10.
        np.testing.assert_allclose([alpha[i, 0], mu[i, 0]], fit, rtol=0, atol=1e-13)


@pytest.mark.parametrize("trit", [-1, 0, 1])
def test_equal_trits_give_the_mean(trit):
    W = [[1.0, 2.0, 6.0], [-1.0, 0.5, 0.5]]
    alpha, mu = build_optimal_grid(W, np.full((2, 3), trit))
    assert alpha.tolist() == [[0.0], [0.0]]
    assert mu.tolist() == [[3.0], [0.0]]


def test_rows_without_a_scale_raise_no_warning():
    with np.errstate(all="raise"):
        alpha, mu = build_optimal_grid([[1.0, 2.0, 6.0]], [[1, 1, 1]])
        T = flexible_round([[1.0, 2.0, 6.0]], alpha, mu)
    assert (alpha.item(), mu.item(), T.tolist()) == (0.0, 3.0, [[0, 0, 0]])


@given(dyadic_matrices(max_rows=2, max_columns=6, limit=64), st.integers(-64, 64), st.integers(-64, 64))
def test_rounding_is_the_least_error_of_all_assignments(W, alpha, mu):
    rows = len(W)
    grid = np.full((rows, 1), alpha / 64), np.full((rows, 1), mu / 64)
    T = flexible_round(W, *grid)
    every = assignments(W.shape[1])
    for i in range(rows):
        # Multiples of 1/4096: all errors are exact and can be compared with ==.
        errors = np.square(W[i] - (grid[0][i] * every + grid[1][i])).sum(axis=1)
        best = every[errors == errors.min()]
        # Of the assignments with the least error, the one with the most zeros: ties go to 0.
        assert T[i].tolist() == best[np.abs(best).sum(axis=1).argmin()].tolist()


def test_ties_round_to_zero_for_either_sign_of_the_scale():
    W = [[2.0, 0.0, 2.0 + 4 * EPS, 0.0 - EPS, 1.0]] * 2
    T = flexible_round(W, [[2.0], [-2.0]], [[1.0], [1.0]])
    assert T.tolist() == [[0, 0, 1, -1, 0], [0, 0, -1, 1, 0]]
    assert T.dtype == np.int8


def test_zero_and_tiny_scales():
    W = [[1.0, -1.0, 0.0]] * 3
    T = flexible_round(W, [[0.0], [5e-324], [-1e-310]], [[0.0]] * 3)
    assert T.tolist() == [[0, 0, 0], [1, -1, 0], [-1, 1, 0]]


def fit_by_enumeration(W):
    """Algorithm 1 with both half-steps by brute force: dense least squares, and all 3^m assignments."""
    alpha, mu, T = ternary_init(W)
    every = assignments(W.shape[1])
    errors = [np.square(W - (alpha * T + mu)).sum()]
    while True:
        for i, w in enumerate(W):
            alpha[i], mu[i] = 0, w.mean()
            if np.ptp(T[i]):
                design = np.column_stack([T[i], np.ones(w.size)])
                alpha[i], mu[i] = np.linalg.lstsq(design, w, rcond=None)[0]
        errors.append(np.square(W - (alpha * T + mu)).sum())
        costs = np.square(W[:, None, :] - (alpha * every[:, None, :] + mu).transpose(1, 0, 2)).sum(axis=2)
        rounded = every[costs.argmin(axis=1)]
        errors.append(np.square(W - (alpha * rounded + mu)).sum())
        if np.array_equal(rounded, T):
            return alpha, mu, T, errors
        T = rounded


@pytest.mark.parametrize("seed", range(6))
def test_every_half_step_is_the_minimum_over_its_argument(seed):
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(4, 6)) + rng.normal(size=(4, 1))
    expected_alpha, expected_mu, expected_T, expected_errors = fit_by_enumeration(W)
    alpha, mu, T, errors = iterative_ternary_fitting(W)
    assert np.array_equal(T, expected_T)
    # Six weights of size 1, a handful of roundings.
    np.testing.assert_allclose(np.hstack([alpha, mu]), np.hstack([expected_alpha, expected_mu]), atol=1e-13)
    np.testing.assert_allclose(errors, expected_errors, rtol=0, atol=1e-13)


def test_fit_is_never_below_the_global_minimum_and_reaches_it_on_a_grid():
    designs = [np.column_stack([t, np.ones(6)]) for t in assignments(6)]
    projections = [design @ np.linalg.pinv(design) for design in designs]
    for w in np.random.default_rng(5).normal(size=(5, 6)):
        least = min(np.square(w - projection @ w).sum() for projection in projections)
        # Rounding of the enumeration itself.
        assert iterative_ternary_fitting(w[None])[3][-1] >= least - 1e-14
    trits = np.array([[1, 0, -1, 1, 0, -1]])
    alpha, mu, T, errors = iterative_ternary_fitting(0.25 * trits - 0.5)
    assert (alpha.item(), mu.item(), T.tolist(), errors[-1]) == (0.25, -0.5, trits.tolist(), 0.0)


@given(dyadic_matrices(max_rows=4, max_columns=12))
def test_error_never_rises_and_the_end_is_a_fixed_point(W):
    alpha, mu, T, errors = iterative_ternary_fitting(W)
    # A residual rounds by EPS·|w|, so E_w does by 2·EPS·|w|·sqrt(E_w), and by squares of EPS·|w|.
    size = np.linalg.norm(W)
    for before, after in pairwise(errors):
        assert after <= before + 8 * EPS * size * np.sqrt(before) + 64 * (EPS * size) ** 2
    assert len(errors) % 2 == 1
    assert len(errors) < 2 * 100 + 1
    assert np.array_equal(flexible_round(W, alpha, mu), T)
    again = build_optimal_grid(W, T)
    assert np.array_equal(again[0], alpha)
    assert np.array_equal(again[1], mu)
    # Same reasoning: never worse than all weights at the row mean.
    assert errors[-1] <= np.square(W - W.mean(axis=1, keepdims=True)).sum() + 64 * EPS * size**2
    assert errors[-1] == pytest.approx(np.square(W - (alpha * T + mu)).sum(), rel=1e-12, abs=0)


def test_limit_leaves_the_optimal_grid_of_the_last_trits():
    W = np.random.default_rng(2).normal(size=(30, 40)) ** 3
    full = iterative_ternary_fitting(W)[3]
    assert len(full) > 5
    for limit in (1, 2):
        alpha, mu, T, errors = iterative_ternary_fitting(W, max_iterations=limit)
        # Grid and rounding `limit` times, then the grid once more.
        assert len(errors) == 2 * limit + 2
        assert errors == full[: 2 * limit + 2]
        for i in range(30):
            fit = np.linalg.lstsq(np.column_stack([T[i], np.ones(40)]), W[i], rcond=None)[0]
            # 40 weights of size up to 10.
            np.testing.assert_allclose([alpha[i, 0], mu[i, 0]], fit, atol=1e-13)


def test_fitting_from_a_given_start_leaves_the_start_alone():
    W = np.array([[0.0, 1.0, 5.0, 6.0]])
    start = np.array([[3.0]]), np.array([[3.0]]), np.array([[-1, -1, 1, 1]], dtype=np.int8)
    alpha, mu, T, errors = iterative_ternary_fitting(W, start=start)
    # Row mean 3 and half the distance of the two pair means, 5.5 and 0.5: residuals of one half.
    assert (alpha.item(), mu.item(), T.tolist()) == (2.5, 3.0, [[-1, -1, 1, 1]])
    assert errors == [2.0, 1.0, 1.0]
    assert [part.tolist() for part in start] == [[[3.0]], [[3.0]], [[-1, -1, 1, 1]]]


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
def test_a_start_that_changes_is_left_alone_and_gives_int8(dtype):
    W = np.array([[0.0, 1.0, 5.0, 9.0]])
    trits = [[-1, 1, 1, 1]]
    start = np.array([[5.0]]), np.array([[4.0]]), np.array(trits, dtype=dtype)
    alpha, mu, T, _ = iterative_ternary_fitting(W, start=start)
    # By hand: the grids 0, 2.5, 5 and 0.5, 3.75, 7 move one trit each; the next moves none.
    assert T.tolist() == [[-1, -1, 0, 1]]
    assert T.dtype == np.int8
    assert (alpha.item(), mu.item()) == pytest.approx((47 / 11, 53 / 11), rel=1e-15)
    assert [part.tolist() for part in start] == [[[5.0]], [[4.0]], trits]


def test_most_rounds_are_those_of_the_settings():
    default = inspect.signature(iterative_ternary_fitting).parameters["max_iterations"].default
    assert default == TernaryConfig().max_iterations


@pytest.mark.parametrize("limit", [0, -3])
def test_no_iterations_are_refused(limit):
    with pytest.raises(ValueError, match="max_iterations"):
        iterative_ternary_fitting([[1.0, 2.0]], max_iterations=limit)


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e-300, 7.0])
def test_constant_rows_are_kept_exactly(value):
    W = np.full((1, 11), value)
    alpha, mu, T, _ = iterative_ternary_fitting(W)
    # The mean of equal numbers is one rounding of their sum away from them.
    np.testing.assert_allclose(alpha * T + mu, W, rtol=11 * EPS, atol=0)
    assert (alpha.item(), T.tolist()) == (0.0, [[0] * 11])


@given(weights_and_trits(), exponents, shuffles)
def test_rows_are_independent_and_powers_of_two_scale_exactly(given, exponent, random):
    W, T = given
    order = list(range(len(W)))
    random.shuffle(order)
    factor = 2.0**exponent

    def agree(got, plain):
        # Multiplying by a power of two changes no mantissa.
        assert np.array_equal(got[0], plain[0][order] * factor)
        assert np.array_equal(got[1], plain[1][order] * factor)
        if len(plain) > 2:
            assert np.array_equal(got[2], plain[2][order])

    agree(ternary_init(W[order] * factor), ternary_init(W))
    agree(build_optimal_grid(W[order] * factor, T[order]), build_optimal_grid(W, T))
    agree(iterative_ternary_fitting(W[order] * factor), iterative_ternary_fitting(W))
    alpha, mu, _ = ternary_init(W)
    rounded = flexible_round(W[order] * factor, alpha[order] * factor, mu[order] * factor)
    assert np.array_equal(rounded, flexible_round(W, alpha, mu)[order])


def test_each_row_alone_gives_the_same_fit():
    W = np.random.default_rng(9).normal(size=(25, 16))
    alpha, mu, T, errors = iterative_ternary_fitting(W)
    alone = [iterative_ternary_fitting(row[None]) for row in W]
    assert np.array_equal(T, np.vstack([fit[2] for fit in alone]))
    assert np.array_equal(alpha, np.vstack([fit[0] for fit in alone]))
    assert np.array_equal(mu, np.vstack([fit[1] for fit in alone]))
    # The sum over 25 rows in another order.
    assert errors[-1] == pytest.approx(sum(fit[3][-1] for fit in alone), rel=1e-14)
