"""Asymmetric targets, against ridge regression on the outputs themselves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.targets import lost_products, shift_targets, token_weights


@st.composite
def problems(draw):
    """W, inputs of the ternary model so far, wanted outputs, and weights of the tokens."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, m, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 8)), draw(st.integers(1, 20))
    W, X = rng.normal(size=(n, m)), rng.normal(size=(tokens, m))
    X_hat = X + 0.3 * rng.normal(size=(tokens, m))
    omega = rng.uniform(0, 3, size=(tokens, 1)) if draw(st.booleans()) else np.ones((tokens, 1))
    return W, X_hat, X @ W.T, omega


@given(problems(), st.sampled_from([0.01, 0.1, 0.7]))
def test_targets_are_the_ridge_regression_of_the_wanted_outputs(problem, damping):
    W, X_hat, Y, omega = problem
    root = np.sqrt(omega)
    C = (root * X_hat).T @ (root * X_hat)
    W_star = shift_targets(W, C, lost_products(Y, W, X_hat, omega), damping)
    ridge = np.sqrt(damping * np.diag(C).mean())
    stacked = np.vstack([root * X_hat, ridge * np.eye(W.shape[1])])
    expected, *_ = np.linalg.lstsq(stacked, np.vstack([root * Y, ridge * W.T]), rcond=None)
    # The condition of H is at most the number of columns over the damping, 800.
    np.testing.assert_allclose(W_star, expected.T, rtol=1e-10, atol=1e-10)


@given(problems())
def test_lost_products_are_sums_over_tokens(problem):
    W, X_hat, Y, omega = problem
    by_token = sum(
        weight * np.outer(y - W @ x, x) for y, x, weight in zip(Y, X_hat, omega[:, 0], strict=True)
    )
    np.testing.assert_allclose(lost_products(Y, W, X_hat, omega), by_token, rtol=1e-12, atol=1e-12)
    plain = lost_products(Y, W, X_hat)
    np.testing.assert_allclose(lost_products(Y, W, X_hat, np.ones(omega.shape)), plain, rtol=1e-13)


@given(problems(), st.floats(0, 1))
def test_strength_goes_in_a_straight_line_from_the_weights_to_the_targets(problem, strength):
    W, X_hat, Y, _ = problem
    C, D = X_hat.T @ X_hat, lost_products(Y, W, X_hat)
    assert np.array_equal(shift_targets(W, C, D, strength=0), W)
    whole = shift_targets(W, C, D)
    between = shift_targets(W, C, D, strength=strength)
    np.testing.assert_allclose(between, (1 - strength) * W + strength * whole, rtol=1e-12, atol=1e-12)


@given(problems())
def test_where_nothing_is_lost_the_weights_stay(problem):
    W, X_hat, _, omega = problem
    D = lost_products(X_hat @ W.T, W, X_hat, omega)
    assert not D.any()
    assert np.array_equal(shift_targets(W, X_hat.T @ X_hat, D), W)


def test_dead_inputs_keep_their_weights_and_change_no_other():
    rng = np.random.default_rng(1)
    X_hat, Y, W = rng.normal(size=(20, 6)), rng.normal(size=(20, 3)), rng.normal(size=(3, 6))
    X_hat[:, [1, 4]] = 0
    C = X_hat.T @ X_hat
    D = lost_products(Y, W, X_hat)
    W_star = shift_targets(W, C, D + 7 * (np.diag(C) == 0))
    assert np.array_equal(W_star[:, [1, 4]], W[:, [1, 4]])
    alive = [0, 2, 3, 5]
    # The mean of the diagonal is taken over all six.
    alone = shift_targets(W[:, alive], C[np.ix_(alive, alive)], D[:, alive], 0.1 * 4 / 6)
    np.testing.assert_allclose(W_star[:, alive], alone, rtol=1e-12)


def test_outputs_come_closer_than_with_the_weights_themselves():
    rng = np.random.default_rng(2)
    X = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    X_hat = X @ (np.eye(12) + 0.1 * rng.normal(size=(12, 12)))
    W = rng.normal(size=(5, 12))
    errors = []
    for strength in (0, 0.25, 0.5, 1):
        D = lost_products(X @ W.T, W, X_hat)
        W_star = shift_targets(W, X_hat.T @ X_hat, D, damping=1e-3, strength=strength)
        errors.append(np.square(X @ W.T - X_hat @ W_star.T).sum())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_weights_of_tokens_make_their_streams_the_same_size():
    rng = np.random.default_rng(3)
    h = rng.normal(size=(5, 7)) * np.array([[1000], [1], [0.01], [0], [30]])
    omega = token_weights(h)
    assert omega.shape == (5, 1)
    np.testing.assert_allclose(np.square(np.sqrt(omega) * h).mean(axis=1), [1, 1, 1, 0, 1])
    assert omega[3] == 0


def test_tokens_without_weight_count_for_nothing():
    rng = np.random.default_rng(4)
    W, X_hat, Y = rng.normal(size=(2, 3)), rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    omega = np.array([[0], [1], [0], [2], [0]])
    kept = [1, 3]
    alone = lost_products(Y[kept], W, X_hat[kept], omega[kept])
    np.testing.assert_allclose(lost_products(Y, W, X_hat, omega), alone, rtol=1e-14)


def test_inputs_and_gram_matrix_of_another_layer_are_named():
    with pytest.raises(ValueError, match=r"X_hat has shape \(2, 4\), expected \(2, 3\)"):
        lost_products(np.ones((2, 1)), np.ones((1, 3)), np.ones((2, 4)))
    with pytest.raises(ValueError, match=r"C has shape \(4, 4\), expected \(3, 3\)"):
        shift_targets(np.ones((1, 3)), np.eye(4), np.ones((1, 3)))


def test_negative_weights_of_tokens_are_named():
    with pytest.raises(ValueError, match=r"omega\[1\] is negative"):
        lost_products(np.ones((3, 1)), np.ones((1, 2)), np.ones((3, 2)), [[1], [-1], [0]])


@pytest.mark.parametrize("strength", [-1e-9, 1 + 1e-9, np.nan, np.inf])
def test_strengths_that_mean_nothing_are_refused(strength):
    with pytest.raises(ValueError, match="strength must be between 0 and 1"):
        shift_targets(np.eye(2), np.eye(2), np.eye(2), strength=strength)
