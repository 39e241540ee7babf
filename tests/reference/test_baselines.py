"""Round-to-nearest and GPTQ, against plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden.arithmetic import Dense
from golden.whole import damped
from reference.baselines import gptq, round_to_nearest
from tests.reference.strategies import dyadic_matrices, quadratic_error, random_gram


def grid(weights, bits, shrink=1.0):
    """All values of the min-max grid of one row and group, 0 among them."""
    low, high = shrink * min(0.0, *weights), shrink * max(0.0, *weights)
    levels = 2**bits - 1
    step = (high - low) / levels or 1.0
    zero = round(-low / step)
    return [step * (q - zero) for q in range(levels + 1)]


def nearest(value, values):
    return min(values, key=lambda v: abs(v - value))


def clipped_grid(weights, bits):
    """Of 80 shrunken grids the one with the least sum of |error|^2.4, the widest of equals."""
    best, least = None, np.inf
    for percent in range(100, 20, -1):
        values = grid(weights, bits, percent / 100)
        error = sum(abs(nearest(w, values) - w) ** 2.4 for w in weights)
        if error < least:
            best, least = values, error
    return best


def surgeon(W, C, bits, group_size, damping, activation_order, clip):
    """GPTQ as optimal brain surgery: invert H of the columns that are left, quantize one, remove it."""
    columns = W.shape[1]
    H, _ = damped(Dense(), C, damping)
    rest = list(range(columns))
    if activation_order:
        rest.sort(key=lambda j: (-C[j, j], j))
    current = np.where(np.diag(C) > 0, W, 0)
    W_hat = np.zeros_like(current)
    for done in range(columns):
        if done % group_size == 0:
            members = rest[:group_size]
            grids = [(clipped_grid if clip else grid)(list(row[members]), bits) for row in current]
        j = rest[0]
        Hinv = np.linalg.inv(H[np.ix_(rest, rest)])
        for row, values in enumerate(grids):
            W_hat[row, j] = nearest(current[row, j], values)
            delta = (current[row, j] - W_hat[row, j]) / Hinv[0, 0]
            current[row, rest] -= delta * Hinv[0]
        rest = rest[1:]
    return W_hat


@pytest.mark.parametrize(("bits", "group_size"), [(2, 128), (2, 4), (3, 5), (1, 3), (4, 1)])
def test_round_to_nearest_is_that_of_a_loop(bits, group_size):
    W = np.random.default_rng(bits).normal(size=(5, 11)) + 0.2
    expected = np.empty_like(W)
    for row, first in np.ndindex(5, 11):
        if first % group_size == 0:
            values = grid(list(W[row, first : first + group_size]), bits)
        expected[row, first] = nearest(W[row, first], values)
    # A product of step and integer.
    np.testing.assert_allclose(round_to_nearest(W, bits, group_size), expected, rtol=0, atol=1e-15)


@given(dyadic_matrices(), st.integers(1, 4), st.integers(1, 9))
def test_rounding_is_within_half_a_step_and_keeps_zeros(W, bits, group_size):
    W_hat = round_to_nearest(W, bits, group_size)
    assert np.array_equal(W_hat[W == 0], np.zeros((W == 0).sum()))
    for first in range(0, W.shape[1], group_size):
        group = W[:, first : first + group_size]
        spread = np.maximum(group.max(axis=1), 0) - np.minimum(group.min(axis=1), 0)
        step = spread / (2**bits - 1)
        # The zero is rounded to a grid point, which moves the ends by at most half a step.
        limit = (step / 2 + 1e-12)[:, None]
        assert (np.abs(W_hat[:, first : first + group_size] - group) <= limit).all()


def test_two_bits_by_hand():
    # Step 1 and zero at 1: the grid is -1, 0, 1, 2.
    assert round_to_nearest([[-1.0, 0.4, 0.6, 2.0]]).tolist() == [[-1.0, 0.0, 1.0, 2.0]]
    # All positive: the grid still starts at 0, with step 2.
    assert round_to_nearest([[6.0, 5.5, 0.5, 3.5]]).tolist() == [[6.0, 6.0, 0.0, 4.0]]
    assert round_to_nearest([[0.0, 0.0]]).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("bits", "group_size", "kind"),
    [(2, 128, "white"), (2, 4, "correlated"), (3, 5, "outlier"), (2, 3, "dead"), (2, 4, "low rank")],
)
def test_gptq_is_optimal_brain_surgery_column_by_column(bits, group_size, kind, clip, activation_order):
    rng = np.random.default_rng(group_size)
    W, C = rng.normal(size=(4, 10)), random_gram(rng, 10, kind)
    got = gptq(W, C, bits, group_size, 0.05, activation_order, clip)
    expected = surgeon(W, C, bits, group_size, 0.05, activation_order, clip)
    # The condition of H is below 1e4, and grids follow the compensated weights.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


def test_defaults_are_those_of_the_paper_of_gptq():
    rng = np.random.default_rng(5)
    W, C = rng.normal(size=(2, 140)), random_gram(rng, 140)
    # 140 columns make two groups of 128: a row has at most eight values, four in each.
    W_hat = gptq(W, C)
    assert np.array_equal(W_hat, gptq(W, C, 2, 128, 0.01, False, False))
    assert all(len(np.unique(row[:128].round(12))) <= 4 for row in W_hat)
    assert all(len(np.unique(row[128:].round(12))) <= 4 for row in W_hat)


def test_groups_are_of_128_columns_unless_said():
    W = np.random.default_rng(9).normal(size=(2, 140))
    assert np.array_equal(round_to_nearest(W), round_to_nearest(W, 2, 128))
    assert not np.array_equal(round_to_nearest(W), round_to_nearest(W, 2, 127))
    assert not np.array_equal(round_to_nearest(W), round_to_nearest(W, 2, 129))


def test_of_inputs_of_equal_power_the_lower_index_is_quantized_first():
    rng = np.random.default_rng(8)
    # Tokens of ±1 give every column the same power, exactly.
    X = rng.choice([-1.0, 1.0], size=(40, 9))
    W, C = rng.normal(size=(3, 9)), X.T @ X
    expected = surgeon(W, C, 2, 4, 0.05, True, False)
    # The condition of H is below 1e3.
    np.testing.assert_allclose(gptq(W, C, 2, 4, 0.05, activation_order=True), expected, rtol=0, atol=1e-12)


def test_of_ranges_with_the_same_error_the_widest_is_kept():
    # Errors to the power of 2.4 are below what float64 holds for every range; the widest has none.
    W = 1e-200 * np.array([[3.0, 1.0, 2.0, 0.0]])
    np.testing.assert_allclose(gptq(W, np.eye(4), clip=True), W, rtol=1e-15)


def test_gptq_with_diagonal_inputs_is_round_to_nearest():
    rng = np.random.default_rng(6)
    W = rng.normal(size=(3, 9))
    # Nothing to compensate with: the inverse is diagonal.
    assert np.array_equal(gptq(W, np.diag(rng.uniform(1, 2, 9)), 2, 4), round_to_nearest(W, 2, 4))


@pytest.mark.parametrize(("weight", "share"), [(0.5, 0.52), (0.25, 0.27), (0.15, 0.21)])
def test_clipping_searches_down_to_just_above_a_fifth_of_the_range(weight, share):
    # At one bit the grid is 0 and s. 119·(s - weight)^2.4 + (1 - s)^2.4 is least at
    # s = (weight + c)/(1 + c) with c = 119^(-1/1.4) = 0.033: 0.516, 0.274, and 0.177, which is beyond
    # the last of the search's 80 steps.
    row = np.full(120, weight)
    row[5] = 1.0
    assert clipped_grid(list(row), 1) == [0.0, share]
    W_hat = gptq(row[None], np.eye(120), 1, 120, clip=True)
    # 1 - i/100 rounds.
    np.testing.assert_allclose(W_hat[0], share, rtol=0, atol=1e-15)


def test_compensation_helps_and_order_and_clipping_help_more():
    rng = np.random.default_rng(7)
    W = rng.normal(size=(24, 48))
    # A few directions that all inputs share, noise, and inputs of unequal size.
    X = rng.normal(size=(300, 8)) @ rng.normal(size=(8, 48)) + 0.3 * rng.normal(size=(300, 48))
    X *= rng.uniform(0.2, 3, 48)
    C = X.T @ X
    plain = quadratic_error(W, round_to_nearest(W), C)
    paper = quadratic_error(W, gptq(W, C), C)
    best = quadratic_error(W, gptq(W, C, activation_order=True, clip=True), C)
    assert best < paper < plain


def test_singular_gram_matrix_without_damping_is_refused():
    with pytest.raises(np.linalg.LinAlgError, match="damping"):
        gptq(np.ones((2, 3)), np.ones((3, 3)), damping=0)


@pytest.mark.parametrize("changes", [{"bits": 0}, {"group_size": 0}, {"group_size": -4}])
def test_grids_that_mean_nothing_are_refused(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        round_to_nearest(np.ones((2, 3)), **changes)
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        gptq(np.ones((2, 3)), np.eye(3), **changes)
