"""Eq. 11-13: the grid refitted to the outputs, and what the printed closed form does instead."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden.arithmetic import Dense
from reference.aga import align_grid, align_grid_printed, output_error, output_error_gradient
from reference.atq import build_optimal_grid
from tests.reference.strategies import (
    EPS,
    fractions,
    layers,
    quadratic_error,
    random_gram,
    weights_and_trits,
)


def solve_exactly(w, t, C):
    """Eq. 12 by Cramer's rule on fractions; None where it is singular."""

    def form(a, b):
        return sum(x * c * y for x, row in zip(a, C, strict=True) for c, y in zip(row, b, strict=True))

    ones = [Fraction(1)] * len(t)
    tt, t1, d = form(t, t), form(t, ones), form(ones, ones)
    wt, w1 = form(w, t), form(w, ones)
    determinant = tt * d - t1 * t1
    if determinant == 0:
        return None
    return (wt * d - w1 * t1) / determinant, (tt * w1 - t1 * wt) / determinant


def integer_gram(rng, columns):
    X = rng.integers(-8, 9, size=(2 * columns, columns))
    return (X.T @ X).astype(float)


def test_output_error_is_the_squared_distance_of_the_outputs():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(20, 6))
    W, W_hat = rng.normal(size=(2, 3, 6))
    expected = sum((x @ w - x @ v) ** 2 for x in X for w, v in zip(W, W_hat, strict=True))
    # Sixty squares of size 10.
    assert output_error(W, W_hat, X.T @ X) == pytest.approx(expected, rel=1e-13)
    assert output_error(W, W, X.T @ X) == 0


def test_gradient_agrees_with_finite_differences():
    rng = np.random.default_rng(4)
    W = rng.normal(size=(3, 6))
    T = rng.integers(-1, 2, size=W.shape)
    C = random_gram(rng, 6)
    alpha, mu = rng.normal(size=(2, 3, 1))
    d_alpha, d_mu = output_error_gradient(W, alpha, mu, T, C)
    h = 2.0**-10
    for i in range(3):
        step = np.zeros((3, 1))
        step[i] = h

        def error(a, m):
            return quadratic_error(W, a * T + m, C)

        by_alpha = (error(alpha + step, mu) - error(alpha - step, mu)) / (2 * h)
        by_mu = (error(alpha, mu + step) - error(alpha, mu - step)) / (2 * h)
        # Central differences of a quadratic have no truncation error; rounding is eps·E_x/h, E_x < 1e4.
        assert d_alpha[i, 0] == pytest.approx(by_alpha, abs=1e-8)
        assert d_mu[i, 0] == pytest.approx(by_mu, abs=1e-8)


@given(weights_and_trits(max_columns=6), st.integers(0, 10**6))
def test_grid_solves_eq_12_exactly(given, seed):
    W, T = given
    C = integer_gram(np.random.default_rng(seed), W.shape[1])
    alpha, mu = align_grid(W, T, C)
    for i, row in enumerate(fractions(W)):
        expected = solve_exactly(row, T[i].tolist(), fractions(C))
        if expected is not None:
            # Integer systems of at most six columns, condition below 1e4, weights up to 4.
            assert alpha[i, 0] == pytest.approx(float(expected[0]), abs=1e-10)
            assert mu[i, 0] == pytest.approx(float(expected[1]), abs=1e-10)


@pytest.mark.parametrize("kind", ["white", "correlated", "low rank", "outlier", "dead", "zero"])
@pytest.mark.parametrize("columns", [1, 2, 9, 40])
def test_grid_is_the_least_squares_fit_to_the_outputs(kind, columns):
    rng = np.random.default_rng(columns)
    W = rng.normal(size=(6, columns)) + 0.4
    T = rng.integers(-1, 2, size=W.shape)
    T[:3] = [[-1], [0], [1]]
    C = random_gram(rng, columns, kind)
    alpha, mu = align_grid(W, T, C)
    # The square root of C knows singular directions only to 1e-8 of the largest.
    np.testing.assert_allclose((alpha, mu), Dense().align(W, T, C), rtol=1e-6, atol=1e-7)


@given(layers())
def test_gradient_is_zero_after_alignment_and_the_error_is_no_larger(layer):
    W, T, C = layer
    alpha, mu = align_grid(W, T, C)
    start = build_optimal_grid(W, T)
    d_alpha, d_mu = output_error_gradient(W, alpha, mu, T, C)
    largest = np.linalg.eigvalsh(C)[-1]
    for i, w in enumerate(W):
        before, after, mean = (
            quadratic_error(w[None], values, C)
            for values in (
                start[0][i] * T[i] + start[1][i],
                alpha[i] * T[i] + mu[i],
                np.full((1, w.size), w.mean()),
            )
        )
        # A residual rounds by EPS·|w| for every weight, and C multiplies it by at most its norm.
        rounding = 16 * EPS * w.size * largest * (w @ w)
        assert after <= before + rounding
        assert after <= mean + rounding
        # Where an eigenvalue counts as zero, up to sqrt(SINGULAR) = 1e-6 of the slope is left standing.
        slope = np.sqrt(w.size * largest * max(before, 0))
        assert abs(d_alpha[i, 0]) <= 4e-6 * slope + 4 * w.size * rounding
        assert abs(d_mu[i, 0]) <= 4e-6 * slope + 4 * w.size * rounding


def test_nearly_collinear_inputs_do_not_blow_the_grid_up():
    rng = np.random.default_rng(6)
    W = rng.normal(size=(8, 16))
    T = rng.integers(-1, 2, size=W.shape)
    direction = rng.normal(size=(1, 16))
    for noise in (1e-2, 1e-5, 1e-8, 0):
        X = rng.normal(size=(64, 1)) @ direction + noise * rng.normal(size=(64, 16))
        alpha, mu = align_grid(W, T, X.T @ X)
        assert np.abs([alpha, mu]).max() < 100
        E = W - (alpha * T + mu)
        # What one direction of outputs needs, one parameter can give: nothing but the noise is left.
        assert np.square(X @ E.T).sum() <= (100 * noise + 1e-6) ** 2 * 64 * 16 * 8


@pytest.mark.parametrize("trit", [-1, 1])
def test_equal_trits_share_the_correction(trit):
    # Only w₁ is seen. Eq. 9 gives (0, 2); alpha and mu move by the same length to reach 3 together.
    C = np.diag([1.0, 0.0])
    alpha, mu = align_grid([[3.0, 1.0]], [[trit, trit]], C)
    # One eigendecomposition of a 2x2 matrix.
    assert alpha.item() == pytest.approx(0.5 * trit, abs=1e-15)
    assert mu.item() == pytest.approx(2.5, abs=1e-15)


@pytest.mark.parametrize(("ratio", "grid"), [(5e-12, (1.5, 1.5)), (5e-13, (1.75, 1.25))])
def test_eigenvalues_below_1e_12_of_the_larger_one_count_as_zero(ratio, grid):
    # The eigenvalues of Eq. 12 are 2 for alpha + mu and 2·ratio for mu - alpha; weight 6 is not seen. Eq. 9
    # gives (1.5, 1). Where the second one counts, both weights that are seen are met: alpha + mu = 3 and
    # mu - alpha = 0. Where it does not, alpha and mu move alike until alpha + mu = 3.
    C = np.diag([1.0, ratio, 0.0])
    alpha, mu = align_grid([[3.0, 0.0, 0.0]], [[1, -1, 0]], C)
    # Roundings of 1e-16, over a ratio of 5e-12.
    assert (alpha.item(), mu.item()) == pytest.approx(grid, abs=1e-3)


@given(layers(max_rows=3), st.integers(-10, 10), st.integers(-10, 10))
def test_rows_are_independent_and_powers_of_two_scale_exactly(layer, exponent, gram_exponent):
    W, T, C = layer
    order = np.arange(len(W))[::-1]
    factor, gram_factor = 2.0**exponent, 4.0**gram_exponent
    for solve in (align_grid, align_grid_printed):
        plain = solve(W, T, C)
        scaled = solve(W * factor, T, C)
        # Multiplying the weights by a power of two changes no mantissa.
        assert all(np.array_equal(a, b * factor) for a, b in zip(scaled, plain, strict=True))
    alpha, mu = align_grid(W, T, C * gram_factor)
    moved_alpha, moved_mu = align_grid(W[order], T[order], C * gram_factor)
    # Products with other rows beside them, and an eigendecomposition that is not told of the scale: the
    # cutoff of 1e-12 magnifies roundings by at most its root.
    np.testing.assert_allclose(moved_alpha, alpha[order], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(moved_mu, mu[order], rtol=1e-6, atol=1e-8)


@given(weights_and_trits(), st.data())
def test_printed_form_is_eq_12_for_every_diagonal_matrix(given, data):
    W, T = given
    columns = W.shape[1]
    weights = data.draw(st.lists(st.integers(0, 64), min_size=columns, max_size=columns))
    C = np.diag(np.array(weights, dtype=float))
    alpha, mu = align_grid_printed(W, T, C)
    for i, row in enumerate(fractions(W)):
        trits = T[i].tolist()
        exact = solve_exactly(row, trits, fractions(C))
        if exact is None or len(set(trits)) == 1:
            # Not solvable in any form: Eq. 9 stays.
            exact = [float(part[i, 0]) for part in build_optimal_grid(W, T)]
        # Integer weights up to 64: a system of condition below 1e4 on weights up to 4.
        assert alpha[i, 0] == pytest.approx(float(exact[0]), abs=1e-10)
        assert mu[i, 0] == pytest.approx(float(exact[1]), abs=1e-10)


@given(layers())
def test_printed_form_weighs_columns_by_row_sums(layer):
    W, T, C = layer
    weights = C.sum(axis=1)
    alpha, mu = align_grid_printed(W, T, C)
    for i, w in enumerate(W):
        design = np.column_stack([T[i], np.ones(w.size)])
        system = design.T @ (weights[:, None] * design)
        if np.ptp(T[i]) and np.linalg.cond(system) < 1e6:
            expected = np.linalg.solve(system, design.T @ (weights * w))
            # Condition 1e6 times roundings of EPS, and what cancels in row sums of either sign.
            np.testing.assert_allclose([alpha[i, 0], mu[i, 0]], expected, rtol=1e-7, atol=1e-7)


def test_printed_form_is_worse_on_correlated_inputs():
    C = np.array([[4.0, 3.0, 0.0], [3.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    W, T = np.array([[1.0, 0.5, -1.0]]), np.array([[1, 0, -1]])
    exact, printed = align_grid(W, T, C), align_grid_printed(W, T, C)
    # By hand, Eq. 12: t C t = 5, t C 1 = 6, 1 C 1 = 15, w C t = 13/2, w C 1 = 19/2, w C w = 9.
    assert [part.item() for part in exact] == pytest.approx([27 / 26, 17 / 78], abs=1e-14)
    # By hand, Eq. 13: the row sums 7, 7, 1 give d = 15, v = 6, T²S1 = 8, (W∘T)S1 = 8, WS1 = 19/2.
    assert [part.item() for part in printed] == pytest.approx([3 / 4, 1 / 3], abs=1e-14)
    # A few roundings of numbers below 10, above and here.
    assert quadratic_error(W, exact[0] * T + exact[1], C) == pytest.approx(7 / 39, abs=1e-14)
    assert quadratic_error(W, printed[0] * T + printed[1], C) == pytest.approx(57 / 144, abs=1e-14)


def unbounded_case(gap):
    """Row sums 4, q + x and x - q for C = v vᵀ + diag; the printed denominator is -`gap`.

    With trits (0, 1, -1) it is d·2x - 4q², where d = 4 + 2x is the sum of all entries. A negative row
    sum, x < q, is what lets it vanish.
    """
    q = 0.5
    # d·2x = 4q² - gap is x² + 2x - (q² - gap/4) = 0.
    x = -1 + np.sqrt(1 + q * q - gap / 4)
    v = np.array([3.0, -1.0, -1.0])
    return np.outer(v, v) + np.diag([1.0, 1 + x + q, 1 + x - q])


def test_printed_form_is_unbounded_where_row_sums_are_negative():
    W, T = np.array([[1.0, 0.75, -0.5]]), np.array([[0, 1, -1]])
    errors = []
    for gap in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        C = unbounded_case(gap)
        assert np.linalg.eigvalsh(C)[0] > 0
        assert C.sum(axis=1).min() < 0
        alpha, mu = align_grid_printed(W, T, C)
        errors.append(quadratic_error(W, alpha * T + mu, C))
        aligned = align_grid(W, T, C)
        assert np.abs(aligned).max() < 2
        assert quadratic_error(W, aligned[0] * T + aligned[1], C) < quadratic_error(W, W.mean(), C)
    growth = np.divide(errors[1:], errors[:-1])
    # The grid goes with one over the denominator, the error with its square, up to terms of order `gap`.
    np.testing.assert_allclose(growth, 100, rtol=0.1)
    assert errors[-1] > 1e8


@pytest.mark.parametrize("trit", [-1, 0, 1])
def test_printed_form_keeps_eq_9_for_equal_trits(trit):
    for columns in range(1, 40):
        # In float64 the denominator d² - d² of this many columns is not always 0.
        C = random_gram(np.random.default_rng(columns), columns)
        alpha, mu = align_grid_printed([np.arange(columns)], np.full((1, columns), trit), C)
        assert (alpha.item(), mu.item()) == (0.0, (columns - 1) / 2)


def test_printed_form_keeps_eq_9_where_its_denominator_is_zero():
    alpha, mu = align_grid_printed([[1.0, 2.0, 6.0]], [[1, 0, 0]], np.zeros((3, 3)))
    # Eq. 9 by hand: the mean of the zeros is 4, the rest of the only other weight is -3.
    assert alpha.item() == pytest.approx(-3, abs=1e-15 * 8)
    assert mu.item() == pytest.approx(4, abs=1e-15 * 8)
