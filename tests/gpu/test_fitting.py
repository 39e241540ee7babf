"""The ITF kernel: with 32 lanes and barriers, in Numba's simulator or on the device."""

import numpy as np
import pytest

import gpu
from gpu.device import STANDIN
from gpu.kernels.fitting import _build, fit_rows
from reference.atq import iterative_ternary_fitting, ternary_init
from reference.twn import symmetric_ternarize
from tests.gpu.ordered_lanes import ORDERS, OrderedLanes

# Constant rows, ties, and magnitudes whose squares leave float32.
HOSTILE = np.array([[0.0] * 5, [1.0] * 5, [-2.5] * 5, [0.5, -0.5, 0.25, -0.25, 0.0], [1e-30, 0, 0, 0, 1e30]])

BOTH = pytest.mark.parametrize("simulate", {STANDIN, False})


def fitted(W, limit, start=None, simulate=STANDIN, **options):
    if start is not None:
        start = tuple(gpu.to_device(part) for part in start)
    results = fit_rows(gpu.to_device(W), limit, start, simulate=simulate, **options)
    return [np.asarray(gpu.to_host(result)) for result in results]


def symmetric_start(w):
    alpha, T = symmetric_ternarize(w)
    return alpha, 0 * alpha, T


def assert_fit(W, limit, results, start=None, symmetric=False):
    grids, T0, T, errors, steps = results
    n = W.shape[0]
    assert (grids.shape, errors.shape, steps.shape) == ((n, 4), (2 * limit + 2, n), (n,))
    assert (T0.dtype, T.dtype, steps.dtype) == (np.int8, np.int8, np.int32)
    for row in range(n):
        own = start and tuple(part[row : row + 1] for part in start)
        w = W[row : row + 1]
        alpha, mu, trits, curve = iterative_ternary_fitting(w, limit, own, symmetric)
        alpha0, mu0, trits0 = own or (symmetric_start(w) if symmetric else ternary_init(w))
        np.testing.assert_array_equal(T0[row], trits0[0])
        np.testing.assert_array_equal(T[row], trits[0])
        expected = np.hstack([alpha0, mu0, alpha, mu])[0]
        np.testing.assert_allclose(grids[row], expected, rtol=0, atol=1e-12 * abs(w).max())
        assert steps[row] == len(curve)
        curve += curve[-1:] * (2 * limit + 2 - len(curve))
        np.testing.assert_allclose(errors[:, row], curve, rtol=0, atol=1e-12 * np.square(w).sum())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("columns", [1, 2, 127, 128, 129])
def test_rows_are_fitted_as_in_the_reference(rows, columns, dtype):
    rng = np.random.default_rng([rows, columns])
    W = (rng.normal(size=(rows, columns)) + 1).astype(dtype)
    assert_fit(W.astype(np.float64), 20, fitted(W, 20))


def test_strides_do_not_matter():
    W = np.random.default_rng(1).normal(size=(90, 6))
    assert_fit(W[::40, ::2], 20, fitted(W[::40, ::2], 20))


@pytest.mark.parametrize("limit", [1, 2])
def test_the_limit_leaves_the_grid_of_the_last_trits(limit):
    W = np.random.default_rng(2).normal(size=(2, 129))
    results = fitted(W, limit)
    assert_fit(W, limit, results)
    assert results[4].max() == 2 * limit + 2


def test_hostile_rows():
    assert_fit(HOSTILE, 20, fitted(HOSTILE, 20))


def test_a_given_start_is_used():
    rng = np.random.default_rng(3)
    W = rng.normal(size=(2, 33))
    start = (
        np.array([[-0.5], [0.7]]),
        np.array([[0.1], [0.0]]),
        rng.integers(-1, 2, W.shape).astype(np.int8),
    )
    assert_fit(W, 20, fitted(W, 20, start=start), start)


@pytest.mark.parametrize("limit", [1, 20])
def test_rows_are_fitted_without_a_shift_as_in_the_reference(limit):
    W = np.vstack([np.random.default_rng(7).normal(size=(3, 129)) + 0.5, np.full((1, 129), -2.0)])
    results = fitted(W, limit, twn=True, symmetric=True)
    assert_fit(W, limit, results, symmetric=True)
    assert (results[0][:, 1::2] == 0).all()


def test_a_start_without_a_shift_is_used():
    W = np.random.default_rng(8).normal(size=(2, 33)) + 1
    start = (np.array([[-0.5], [0.0]]), np.zeros((2, 1)), np.zeros(W.shape, np.int8))
    start[2][0, ::2] = -1
    assert_fit(W, 20, fitted(W, 20, start=start, symmetric=True), start, symmetric=True)


def test_symmetric_initialization_alone():
    W = np.random.default_rng(4).normal(size=(3, 40)) + 0.3
    grids, T0, T, errors, steps = fitted(W, 0, twn=True)
    alpha, trits = symmetric_ternarize(W)
    np.testing.assert_array_equal(T, trits)
    np.testing.assert_array_equal(T0, trits)
    np.testing.assert_allclose(grids, np.hstack([alpha, 0 * alpha, alpha, 0 * alpha]), rtol=1e-13)
    np.testing.assert_allclose(errors[0], np.square(W - alpha * trits).sum(axis=1), rtol=1e-13)
    assert (steps == 1).all()


@BOTH
@pytest.mark.parametrize("factor", [1 + 2.0**-30, 1 - 2.0**-30])
def test_a_weight_at_the_threshold_has_the_trit_0(factor, simulate):
    # Exact in float64 and not in float32: the mean magnitude is 4, and the threshold 3.
    W = factor * np.array([[3.0, -3.0, 5.0, -5.0], [-5.0, 3.0, -3.0, 5.0]])
    trits = [[0, 0, 1, -1], [-1, 0, 0, 1]]
    for twn in (False, True):
        _, T0, T, _, steps = fitted(W, 0, twn=twn, simulate=simulate)
        assert T0.tolist() == T.tolist() == trits
        assert steps.tolist() == [1, 1]


@BOTH
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("factor", [1 + 2.0**-30, 1 - 2.0**-30])
def test_a_weight_between_two_levels_has_the_trit_0(factor, sign, simulate):
    # Eq. 9 of these trits is exact: the levels -2, 0 and 2, and between them the weights 1 and -1.
    W = factor * np.array([[2.0, -2.0, 1.0, -1.0]])
    T = sign * np.array([[1, -1, 0, 0]], np.int8)
    grids, _, fixed, errors, steps = fitted(W, 5, (np.ones((1, 1)), np.zeros((1, 1)), T), simulate=simulate)
    assert fixed.tolist() == T.tolist()
    assert grids[:, 2:].tolist() == [[2 * sign * factor, 0.0]]
    assert (errors[1:] == 2 * factor**2).all()
    assert steps.tolist() == [3]


@BOTH
@pytest.mark.parametrize("trit", [-1, 0, 1])
def test_equal_trits_become_0(trit, simulate):
    W = np.array([[0.0, 1.0, 2.0, 7.0]])
    T = np.full(W.shape, trit, np.int8)
    start = (np.ones((1, 1)), np.zeros((1, 1)), T)
    results = fitted(W, 4, start, simulate=simulate)
    assert_fit(W, 4, results, start)
    assert results[2].tolist() == [[0, 0, 0, 0]]
    assert results[0][:, 2:].tolist() == [[0.0, 2.5]]


@BOTH
def test_rows_that_end_sooner_and_later_keep_their_own_curves(simulate):
    rng = np.random.default_rng(6)
    W = np.vstack([rng.normal(size=(6, 70)), np.ones((1, 70))])
    results = fitted(W, 30, simulate=simulate)
    assert_fit(W, 30, results)
    assert len(set(results[4].tolist())) > 3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("columns", "limit"), [(1, 3), (4, 1), (11, 12), (23, 2)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_lanes_share_a_row_in_any_order(order, columns, limit, dtype, symmetric):
    lanes = OrderedLanes(order)
    fit_row = _build(lanes.target)
    W = (np.random.default_rng(columns).normal(size=(2, columns)) + 1).astype(dtype)
    grids, errors = np.full((2, 4), np.nan), np.full((2 * limit + 2, 2), np.nan)
    T0, T = np.full(W.shape, 9, np.int8), np.full(W.shape, 9, np.int8)
    steps, partial = np.zeros(2, np.int32), np.full(len(order), np.nan)
    arrays = (grids, T0, T, errors, steps)
    flags = False, symmetric, symmetric
    for row in range(2):
        lanes.run(
            lambda lane, lanes_, row=row: fit_row(W, *flags, limit, *arrays, row, partial, lane, lanes_)
        )
    assert_fit(W.astype(np.float64), limit, arrays, symmetric=symmetric)
