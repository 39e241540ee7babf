"""Rounding fed forward: the kernel in Numba's simulator or on the device, and at full sizes."""

import numpy as np
import pytest

import gpu
from gpu.device import STANDIN
from gpu.feedforward import round_fed_forward
from gpu.kernels.feedforward import _build, feed_rows
from reference.feedforward import round_fed_forward as reference
from tests.gpu.ordered_lanes import ORDERS, OrderedLanes
from tests.reference.strategies import random_gram

BOTH = pytest.mark.parametrize("simulate", {STANDIN, False})


def block(rows, columns, kind="white", dtype="float64"):
    rng = np.random.default_rng([rows, columns])
    W = (rng.normal(size=(rows, columns)) + rng.normal(size=(rows, 1))).astype(dtype)
    C = random_gram(rng, columns, kind)
    Hinv = np.linalg.inv(C + (0.1 * np.diag(C).mean() + 1e-3) * np.eye(columns))
    return W, rng.normal(size=(rows, 1)), W.mean(axis=1, keepdims=True).astype(float), (Hinv + Hinv.T) / 2


def fed(W, alpha, mu, Hinv, simulate=STANDIN):
    L = np.linalg.cholesky(Hinv)
    return np.asarray(gpu.to_host(feed_rows(*map(gpu.to_device, (W, alpha, mu, L)), simulate=simulate)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 2), (1, 31), (2, 33), (1, 70)])
def test_rows_are_rounded_as_in_the_reference(rows, columns, dtype):
    arguments = block(rows, columns, dtype=dtype)
    T = fed(*arguments)
    assert T.dtype == np.int8
    np.testing.assert_array_equal(T, reference(*arguments))


@pytest.mark.parametrize("kind", ["white", "correlated", "low rank", "outlier", "dead"])
@pytest.mark.parametrize(("rows", "columns"), [(300, 9), (130, 128), (40, 257)])
def test_full_sizes(rows, columns, kind):
    W, alpha, mu, Hinv = block(rows, columns, kind)
    alpha[3] = 0
    T = gpu.to_host(round_fed_forward(*map(gpu.to_device, (W, alpha, mu, Hinv))))
    np.testing.assert_array_equal(T, reference(W, alpha, mu, Hinv))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("columns", [1, 4, 11])
def test_lanes_share_a_row_in_any_order(order, columns):
    lanes = OrderedLanes(order)
    feed_row = _build(lanes.target)
    W, alpha, mu, Hinv = block(2, columns)
    T = np.full(W.shape, 9, np.int8)
    arguments = (W.copy(), np.hstack([alpha, mu]), np.linalg.cholesky(Hinv).T.copy(), T)
    for row in range(2):
        lanes.run(lambda lane, lanes_, row=row: feed_row(*arguments, row, lane, lanes_))
    np.testing.assert_array_equal(T, reference(W, alpha, mu, Hinv))


@BOTH
@pytest.mark.parametrize("alpha", [2.0, -2.0, 0.0])
def test_errors_and_ties_by_hand(alpha, simulate):
    """U = [[2, 4], [0, 1]]: twice the error of the first column leaves the second, where a tie goes to 0."""
    U = np.array([[2.0, 4.0], [0.0, 1.0]])
    # Levels are -2, 0, 2. The first column: 1.25 is 2 with the error -0.75, 1 is a tie.
    W = np.array([[1.25, 0.0], [1.25, -0.5], [1.0, 2.5], [1.0, 3.0], [1.0, 3.25]])
    sign = int(np.sign(alpha))
    # The second becomes w + 1.5, or w - 2 after the tie.
    expected = sign * np.array([[1, 1], [1, 0], [0, 0], [0, 0], [0, 1]])
    T = fed(W, np.full((5, 1), alpha), np.zeros((5, 1)), U.T @ U, simulate)
    assert T.tolist() == expected.tolist()


def test_an_inverse_that_is_not_positive_definite_is_refused():
    W, alpha, mu, _ = block(2, 2)
    Hinv = np.array([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(np.linalg.LinAlgError, match="Hinv is not positive definite"):
        round_fed_forward(*map(gpu.to_device, (W, alpha, mu, Hinv)))
