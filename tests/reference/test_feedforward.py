"""Rounding fed forward, against compensation by least squares one column at a time."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reference.atq import flexible_round
from reference.feedforward import round_fed_forward
from reference.gptq import invert_damped
from tests.reference.strategies import GRAM_KINDS, quadratic_error, random_gram


@st.composite
def blocks(draw):
    """Weights over the block and what remains, a grid, H, and the number of columns in the block."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, m = draw(st.integers(1, 4)), draw(st.integers(1, 10))
    k = draw(st.integers(1, m))
    H = random_gram(rng, m, draw(st.sampled_from(GRAM_KINDS)))
    H = H + 0.05 * (np.trace(H) / m or 1) * np.eye(m)
    W, alpha, mu = rng.normal(size=(n, m)), rng.normal(size=(n, 1)), 0.2 * rng.normal(size=(n, 1))
    return W, alpha, mu, H, k


def rounded_one_by_one(W, alpha, mu, H, k):
    """Each column rounded where the columns after it, if they could be anything, would have it."""
    m = len(H)
    root = np.linalg.cholesky(H)  # E H Eᵀ is the squared norm of E root
    T, now, W_hat = np.zeros((len(W), k), np.int8), W.copy(), W.copy()
    for j in range(k):
        T[:, j : j + 1] = flexible_round(now[:, j : j + 1], alpha, mu)
        W_hat[:, j] = (alpha * T[:, j : j + 1] + mu)[:, 0]
        if j + 1 < m:
            error = (W - W_hat)[:, : j + 1] @ root[: j + 1]
            change, *_ = np.linalg.lstsq(root[j + 1 :].T, error.T, rcond=None)
            now[:, j + 1 :] = W[:, j + 1 :] + change.T
    return T


@given(blocks())
def test_every_column_is_rounded_where_the_columns_after_it_would_have_it(block):
    W, alpha, mu, H, k = block
    T = round_fed_forward(W[:, :k], alpha, mu, np.linalg.inv(H)[:k, :k])
    assert T.dtype == np.int8
    assert np.array_equal(T, rounded_one_by_one(W, alpha, mu, H, k))


def test_uncoupled_columns_are_rounded_by_themselves():
    rng = np.random.default_rng(1)
    W, alpha, mu = rng.normal(size=(6, 9)), rng.normal(size=(6, 1)), rng.normal(size=(6, 1))
    T = round_fed_forward(W, alpha, mu, np.diag(rng.uniform(1, 5, size=9)))
    assert np.array_equal(T, flexible_round(W, alpha, mu))


def test_error_by_hand():
    """H⁻¹ = [[1, ½], [½, 1]]: half of the first error leaves the second column."""
    # 0.4 goes to 0, and 0.6 - 0.4 / 2 = 0.4 does too; alone it would have gone to 1.
    T = round_fed_forward([[0.4, 0.6]], [[1.0]], [[0.0]], [[1.0, 0.5], [0.5, 1.0]])
    assert T.tolist() == [[0, 0]]


def test_rows_of_correlated_inputs_lose_less():
    rng = np.random.default_rng(2)
    X = rng.normal(size=(300, 3)) @ rng.normal(size=(3, 40)) + 0.5 * rng.normal(size=(300, 40))
    C = X.T @ X
    W, alpha, mu = rng.normal(size=(30, 40)), np.full((30, 1), 1.2), np.zeros((30, 1))
    Hinv, _ = invert_damped(C, 0.01)
    plain = quadratic_error(W, alpha * flexible_round(W, alpha, mu), C)
    assert quadratic_error(W, alpha * round_fed_forward(W, alpha, mu, Hinv), C) < 0.5 * plain


def test_input_is_left_alone():
    W = np.array([[0.3, 0.7, -0.2]])
    before = W.copy()
    round_fed_forward(W, [[1.0]], [[0.0]], np.eye(3) + 0.3)
    assert np.array_equal(W, before)
