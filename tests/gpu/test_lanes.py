"""What lanes share: sums and Eq. 9 of a row, in whatever order the lanes come."""

import numpy as np
import pytest

from reference.atq import build_optimal_grid
from tests.gpu.ordered_lanes import ORDERS, OrderedLanes


@pytest.mark.parametrize("order", ORDERS)
def test_every_lane_holds_the_sum_in_the_order_of_the_lanes(order):
    lanes = OrderedLanes(order)
    # In another order, the ones are lost or not.
    values = [np.array([1e16, 1.0, -1e16, 1.0, 1.0])[: len(order)] * factor for factor in (1, 2, -4)]
    expected = [0.0, 0.0, 0.0]
    for i, terms in enumerate(values):
        for term in terms:
            expected[i] += term
    partial = np.full(len(order), np.nan)

    def sums(lane, lanes_):
        return [lanes.target.total(partial, lane, lanes_, terms[lane]) for terms in values]

    assert lanes.run(sums) == [expected] * len(order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("columns", [1, 4, 5, 6, 23])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_lane_holds_the_grid_of_the_reference(order, columns, dtype, symmetric):
    rng = np.random.default_rng(columns)
    W = (rng.normal(size=(4, columns)) + 3).astype(dtype)
    T = rng.integers(-1, 2, W.shape).astype(np.int8)
    T[2:] = [[1], [0]]  # without a scale
    lanes = OrderedLanes(order)
    partial = np.full(len(order), np.nan)
    for row in range(4):
        grids = lanes.run(
            lambda lane, lanes_, row=row: lanes.target.optimal_grid(
                W, T, row, symmetric, partial, lane, lanes_
            )
        )
        assert len(set(grids)) == 1
        own = slice(row, row + 1)
        expected = np.ravel(build_optimal_grid(W[own].astype(np.float64), T[own], symmetric))
        np.testing.assert_allclose(grids[0], expected, rtol=0, atol=1e-14 * abs(W[row]).max())
