"""The joint grid, against dense least squares over all grid values of a row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.joint import RIDGE, align_jointly, damped_objective, spread, whole_error
from tests.reference.strategies import layers, quadratic_error, square_root


@st.composite
def rows(draw, max_rows=3, max_columns=9):
    """W, T, a grid of blocks, and H, damped."""
    W, T, C = draw(layers(max_rows, max_columns))
    k = draw(st.integers(1, W.shape[1] + 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    blocks = -(-W.shape[1] // k)
    alpha, mu = rng.normal(size=(len(W), blocks)), rng.normal(size=(len(W), blocks))
    return W, T, alpha, mu, damped_objective(C, 0.1), k


def dequantized(T, alpha, mu, k):
    return np.array(
        [
            [alpha[i, j // k] * t + mu[i, j // k] for j, t in enumerate(row)]
            for i, row in enumerate(np.asarray(T, dtype=float))
        ]
    )


def designs(t, k):
    """One column for alpha, and one for mu, of every block."""
    block = np.arange(len(t)) // k
    inside = block[:, None] == np.arange(block[-1] + 1)
    return np.hstack([inside * t[:, None], inside * 1.0])


@given(rows())
def test_correction_is_an_augmented_least_squares_solution(case):
    """The ridge is one more row of the least squares problem for every value of the grid."""
    W, T, alpha, mu, H, k = case
    new_alpha, new_mu = align_jointly(W, T, alpha, mu, H, k)
    root = square_root(H)
    residual = W - dequantized(T, alpha, mu, k)
    for i, t in enumerate(T):
        P = designs(t, k)
        size = np.sqrt(RIDGE * np.einsum("ja,jl,la->a", P, H, P))
        stacked = np.vstack([root.T @ P, np.diag(size)])
        right = np.concatenate([root.T @ residual[i], np.zeros(P.shape[1])])
        scales = np.where(size > 0, size, 1)  # of columns, so that no small one is cut off
        expected = np.linalg.lstsq(stacked / scales, right, rcond=None)[0] / scales
        change = np.concatenate([new_alpha[i] - alpha[i], new_mu[i] - mu[i]])
        # Its condition is below 1 / RIDGE times the number of values.
        np.testing.assert_allclose(change, expected, rtol=1e-8, atol=1e-8)


@given(rows())
def test_error_falls_by_what_the_ridge_leaves(case):
    W, T, alpha, mu, H, k = case
    before = whole_error(W, dequantized(T, alpha, mu, k), H)
    new_alpha, new_mu = align_jointly(W, T, alpha, mu, H, k)
    after = whole_error(W, dequantized(T, new_alpha, new_mu, k), H)
    fall = 0.0
    for i, t in enumerate(T):
        P = designs(t, k)
        A = P.T @ H @ P
        x = np.concatenate([new_alpha[i] - alpha[i], new_mu[i] - mu[i]])
        fall += x @ A @ x + 2 * RIDGE * np.diag(A) @ (x * x)
    assert after <= before * (1 + 1e-12)
    assert before - after == pytest.approx(fall, rel=1e-9, abs=1e-12 * before)


@given(rows())
def test_repeated_it_reaches_dense_least_squares(case):
    W, T, alpha, mu, H, k = case
    for _ in range(30):
        alpha, mu = align_jointly(W, T, alpha, mu, H, k)
    root = square_root(H)
    least = 0.0
    for w, t in zip(W, T, strict=True):
        solution, *_ = np.linalg.lstsq(root.T @ designs(t, k), root.T @ w, rcond=1e-7)
        least += np.square(root.T @ (w - designs(t, k) @ solution)).sum()
    power = quadratic_error(W, np.zeros_like(W), H)
    # Where H hardly tells two directions apart, the ridge shortens each correction by up to a half.
    assert whole_error(W, dequantized(T, alpha, mu, k), H) == pytest.approx(least, rel=1e-3, abs=1e-9 * power)


@given(rows())
def test_slopes_of_the_ridge_problem_vanish_at_the_solution(case):
    """Central differences of the error with the ridge, in every grid value."""
    W, T, alpha, mu, H, k = case
    solved = align_jointly(W, T, alpha, mu, H, k)
    weights = [designs(t, k) for t in T]
    diagonals = np.array([np.diag(P.T @ H @ P) for P in weights])

    def objective(grid):
        change = np.hstack([grid[0] - alpha, grid[1] - mu])
        return quadratic_error(W, dequantized(T, *grid, k), H) + RIDGE * (diagonals * change**2).sum()

    size = objective((alpha, mu)) + quadratic_error(W, np.zeros_like(W), H)
    for part in (0, 1):
        for index in np.ndindex(alpha.shape):
            ends = []
            for step in (0.5, -0.5):
                moved = [solved[0].copy(), solved[1].copy()]
                moved[part][index] += step
                ends.append(objective(moved))
            assert abs(ends[0] - ends[1]) <= 1e-9 * (size + max(ends))


def test_columns_take_the_value_of_their_block():
    assert spread([[1, 2, 3]], 7, 3).tolist() == [[1, 1, 1, 2, 2, 2, 3]]
    assert spread([[1], [2]], 2, 128).tolist() == [[1, 1], [2, 2]]
    for columns in (6, 10):
        with pytest.raises(ValueError, match="grid has shape"):
            spread([[1, 2, 3]], columns, 3)


def test_dead_inputs_cost_nothing_and_others_their_share_of_the_mean():
    C = np.array([[2.0, 0, 1], [0, 0, 0], [1, 0, 4]])
    assert damped_objective(C, 0.5).tolist() == [[3, 0, 1], [0, 0, 0], [1, 0, 5]]
    assert damped_objective(np.zeros((2, 2)), 0.5).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("damping", [-1e-9, np.inf, np.nan])
def test_dampings_that_mean_nothing_are_refused(damping):
    with pytest.raises(ValueError, match="damping must be a finite number that is not negative"):
        damped_objective(np.eye(2), damping)
    assert np.array_equal(damped_objective(np.eye(2), 0), np.eye(2))


@given(layers())
def test_error_is_that_of_rows_and_of_outputs(layer):
    W, T, C = layer
    root = square_root(C)
    assert whole_error(W, T, C) == pytest.approx(np.square((W - T) @ root).sum(), rel=1e-9, abs=1e-9)
    assert whole_error(W, W, C) == 0
