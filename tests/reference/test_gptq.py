"""Block error compensation: the Gram matrix, its damped inverse, and the exact block step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.gptq import compensate, damp, eliminate, gram, invert_damped
from tests.reference.strategies import fractions, quadratic_error, random_gram, square_root


def positive_definite(rng, columns, kind="white"):
    C = random_gram(rng, columns, kind)
    return C + 0.1 * np.diag(C).mean() * np.eye(columns)


def split(rng, columns, block):
    order = rng.permutation(columns)
    return np.sort(order[:block]), np.sort(order[block:])


def test_gram_matrix_is_the_sum_over_tokens():
    X = np.random.default_rng(0).integers(-9, 10, size=(5, 4))
    expected = sum(np.outer(token, token) for token in X)
    assert np.array_equal(gram(X), expected)
    assert gram(X).dtype == np.float64


@given(st.integers(1, 6), st.integers(0, 2**20), st.integers(0, 64))
def test_damping_is_a_share_of_the_mean_diagonal(columns, seed, share):
    X = np.random.default_rng(seed).integers(-9, 10, size=(4, columns))
    C = (X.T @ X).astype(float)
    exact = fractions(C)
    mean = sum(exact[j][j] for j in range(columns)) / columns
    H = damp(C, share / 64)
    for i, j in np.ndindex(columns, columns):
        # One division and one product round.
        assert H[i, j] == pytest.approx(float(exact[i][j] + (i == j) * share * mean / 64), rel=1e-15)


@pytest.mark.parametrize("damping", [-0.01, np.inf, np.nan])
def test_damping_that_is_no_share_is_refused(damping):
    for function in (damp, invert_damped):
        with pytest.raises(ValueError, match="damping"):
            function(np.eye(2), damping)


@pytest.mark.parametrize("kind", ["white", "correlated", "low rank", "outlier"])
def test_inverse_is_that_of_the_damped_matrix(kind):
    C = random_gram(np.random.default_rng(2), 12, kind)
    Hinv, damping = invert_damped(C, 0.01)
    assert damping == 0.01
    H = C + 0.01 * np.diag(C).mean() * np.eye(12)
    # Condition below 12/0.01 times roundings.
    np.testing.assert_allclose(Hinv, np.linalg.inv(H), rtol=0, atol=1e-11 * np.abs(Hinv).max())


def test_dead_inputs_are_uncoupled_from_the_others():
    C = random_gram(np.random.default_rng(3), 5)
    C[[1, 4]] = C[:, [1, 4]] = 0
    Hinv, damping = invert_damped(C, 0.25)
    alive = [0, 2, 3]
    expected = np.eye(5)
    # The mean is over all five columns, dead ones too.
    H = C[np.ix_(alive, alive)] + 0.25 * np.trace(C) / 5 * np.eye(3)
    expected[np.ix_(alive, alive)] = np.linalg.inv(H)
    assert damping == 0.25
    # Condition below 100 times roundings.
    np.testing.assert_allclose(Hinv, expected, rtol=1e-12, atol=1e-14)


def test_a_gram_matrix_of_zeros_has_an_inverse():
    Hinv, damping = invert_damped(np.zeros((3, 3)), 0.01)
    assert np.array_equal(Hinv, np.eye(3))
    assert damping == 0.01


@pytest.mark.parametrize(
    ("coupling", "damping", "used"),
    [
        # [[1, c], [c, 1]] has the eigenvalue 1 - c, so damping must exceed c - 1.
        (0.5, 0.0, 0.0),
        (1.005, 0.001, 0.01),
        (1.05, 0.001, 0.1),
        (1.5, 0.01, 1.0),
        (1.5, 0.7, 0.7),
    ],
)
def test_damping_is_raised_in_steps_of_ten_until_there_is_an_inverse(coupling, damping, used):
    C = np.array([[1.0, coupling], [coupling, 1.0]])
    Hinv, reported = invert_damped(C, damping)
    # Repeated multiplication by ten rounds.
    assert reported == pytest.approx(used, rel=1e-15)
    np.testing.assert_allclose(Hinv @ (C + used * np.eye(2)), np.eye(2), atol=1e-12)


def test_a_numerically_singular_matrix_is_damped_although_it_has_a_factor():
    # H = 1 + d I of size 3 has the reciprocal condition d/4 in the 1-norm; below 2.2e-16 it has no
    # inverse to rounding. 3e-16 is below, 3e-15 is not.
    _, damping = invert_damped(np.ones((3, 3)), 3e-18)
    assert damping == pytest.approx(3e-15, rel=1e-14, abs=0)


@pytest.mark.parametrize(
    ("C", "damping"),
    [
        # Opposite signs leave the norm what it is: 3 in every column, and 1 without the magnitudes.
        (np.outer([1, -1, 1], [1, -1, 1]), 6e-18),
        # So does a weak input, which lowers the mean of the diagonal to 3/4: the largest column counts.
        (np.outer([1, 1, 1, 0], [1, 1, 1, 0]) + np.diag([0, 0, 0, 2.0**-10]), 4e-18),
    ],
)
def test_the_norm_of_the_largest_column_tells_what_is_singular_to_rounding(C, damping):
    # As above: with 3e-16 or 6e-16 on the diagonal the reciprocal condition is below 2.2e-16, and with ten
    # times that above.
    _, used = invert_damped(C, damping)
    assert used == pytest.approx(1000 * damping, rel=1e-14, abs=0)


def test_a_singular_matrix_whose_factor_does_not_show_it_is_refused():
    # L with ones on the diagonal and -1 below is its exact factor; the inverse of L holds 2^38.
    L = np.tril(-np.ones((40, 40)), -1) + np.eye(40)
    assert np.array_equal(np.linalg.cholesky(L @ L.T), L)
    with pytest.raises(np.linalg.LinAlgError, match="40 inputs, 0 dead"):
        invert_damped(L @ L.T, 0.0)


@pytest.mark.parametrize(
    ("C", "damping", "tried"),
    [
        (np.ones((3, 3)), 0.0, r"3 inputs, 0 dead\).*with damping 0;"),
        (np.diag([1.0, 0.0, 1.0]) + np.fliplr(np.diag([1.0, 0.0, 1.0])), 0.0, "3 inputs, 1 dead"),
        (np.array([[1.0, 1.5], [1.5, 1.0]]), 0.02, "with damping 0.02, 0.2;"),
        (np.array([[1.0, 3.0], [3.0, 1.0]]), 0.01, "with damping 0.01, 0.1, 1;"),
        # One more step would be 1.005.
        (np.array([[1.0, 1.5], [1.5, 1.0]]), 0.1005, "with damping 0.1005;"),
    ],
)
def test_no_inverse_is_an_error_that_lists_what_was_tried(C, damping, tried):
    with pytest.raises(np.linalg.LinAlgError, match=tried):
        invert_damped(C, damping)


@pytest.mark.parametrize("columns", [2, 3, 5])
def test_a_single_direction_has_no_inverse_although_rounding_may_leave_a_factor(columns):
    for seed in range(50):
        # About one in ten of these has a Cholesky factor in float64.
        C = random_gram(np.random.default_rng(seed), columns, "low rank")
        with pytest.raises(np.linalg.LinAlgError, match="with damping 0;"):
            invert_damped(C, 0)


@given(st.integers(2, 9), st.integers(0, 2**20), st.data())
def test_eliminating_a_block_leaves_the_inverse_of_the_rest(columns, seed, data):
    rng = np.random.default_rng(seed)
    H = positive_definite(rng, columns, data.draw(st.sampled_from(["white", "correlated", "outlier"])))
    B, R = split(rng, columns, data.draw(st.integers(1, columns - 1)))
    Hinv = np.linalg.inv(H)
    rest = eliminate((Hinv + Hinv.T) / 2, B, R)
    expected = np.linalg.inv(H[np.ix_(R, R)])
    assert np.array_equal(rest, rest.T)
    # Condition below 10 columns / 0.1, squared by the difference that a Schur complement is.
    np.testing.assert_allclose(rest, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@given(st.integers(2, 9), st.integers(0, 2**20), st.data())
def test_compensation_is_the_least_squares_solution_for_the_rest(columns, seed, data):
    rng = np.random.default_rng(seed)
    H = positive_definite(rng, columns, data.draw(st.sampled_from(["white", "correlated", "outlier"])))
    B, R = split(rng, columns, data.draw(st.integers(1, columns - 1)))
    W, E = rng.normal(size=(3, columns)), rng.normal(size=(3, B.size))
    Hinv = np.linalg.inv(H)
    got = compensate(W[:, R], E, Hinv[np.ix_(B, B)], Hinv[np.ix_(B, R)])
    # Minimize |(E_B, V_R) L| over the errors V_R, L Lᵀ = H; then W_R - V_R are the new weights.
    root = square_root(H)
    V = np.linalg.lstsq(root[R].T, -(E @ root[B]).T, rcond=None)[0].T
    # Condition below 10 columns + 1, as a tenth of the mean diagonal is added to a Gram matrix.
    np.testing.assert_allclose(got, W[:, R] - V, rtol=0, atol=1e-12 * (1 + np.abs(V).max()))

    def error(moved):
        W_hat = W.copy()
        W_hat[:, B] -= E
        W_hat[:, R] = moved
        return quadratic_error(W, W_hat, H)

    for _ in range(3):
        # The direction that a minimum is least sensitive to may change it by roundings only.
        assert error(got) <= error(got + 0.1 * rng.normal(size=got.shape)) * (1 + 1e-9)


def test_one_column_is_the_optimal_brain_surgeon_step():
    rng = np.random.default_rng(7)
    H = positive_definite(rng, 5)
    Hinv = np.linalg.inv(H)
    W, e = rng.normal(size=(2, 4)), rng.normal(size=(2, 1))
    got = compensate(W, e, Hinv[:1, :1], Hinv[:1, 1:])
    # A quotient and a product of numbers of size 1.
    np.testing.assert_allclose(got, W - e / Hinv[0, 0] * Hinv[0, 1:], rtol=0, atol=1e-13)


def test_a_block_at_once_equals_its_columns_one_at_a_time():
    rng = np.random.default_rng(8)
    H = positive_definite(rng, 9, "correlated")
    W, W_hat = rng.normal(size=(2, 3, 9))
    B, R = np.arange(4), np.arange(4, 9)
    Hinv = np.linalg.inv(H)
    at_once = compensate(W[:, R], (W - W_hat)[:, B], Hinv[np.ix_(B, B)], Hinv[np.ix_(B, R)])
    for _ in B:
        # Each column's error is that of the weight as compensated for the columns before it.
        W = compensate(W[:, 1:], W[:, :1] - W_hat[:, :1], Hinv[:1, :1], Hinv[:1, 1:])
        W_hat = W_hat[:, 1:]
        Hinv = eliminate(Hinv, np.array([0]), np.arange(1, len(Hinv)))
    # Condition below 1e3.
    np.testing.assert_allclose(at_once, W, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["white", "correlated", "outlier"])
def test_costs_of_the_blocks_add_up_to_the_error_of_the_matrix(kind):
    """E (H⁻¹_BB)⁻¹ Eᵀ is what a block costs in the end: the identity behind aga="conditional"."""
    rng = np.random.default_rng(12)
    columns = 11
    H = positive_definite(rng, columns, kind)
    W = rng.normal(size=(4, columns))
    W_hat = np.empty_like(W)
    rest, W_rest, Hinv, total = np.arange(columns), W, np.linalg.inv(H), 0.0
    for size in (3, 4, 1, 3):
        B, R = split(rng, rest.size, size)
        E = W_rest[:, B] - np.round(W_rest[:, B])
        W_hat[:, rest[B]] = W_rest[:, B] - E
        total += np.trace(E @ np.linalg.inv(Hinv[np.ix_(B, B)]) @ E.T)
        if R.size:
            W_rest = compensate(W_rest[:, R], E, Hinv[np.ix_(B, B)], Hinv[np.ix_(B, R)])
            Hinv = eliminate(Hinv, B, R)
        rest = rest[R]
    # Condition below some 100 times roundings.
    assert total == pytest.approx(quadratic_error(W, W_hat, H), rel=1e-12)
