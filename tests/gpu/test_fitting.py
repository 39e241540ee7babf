"""The ITF kernel: with 32 lanes and barriers, in Numba's simulator or on the device."""

import numpy as np
import pytest

import gpu
from gpu.device import STANDIN
from gpu.kernels.fitting import fit_rows
from reference.atq import iterative_ternary_fitting, ternary_init
from reference.twn import symmetric_ternarize

# Constant rows, ties, and magnitudes whose squares leave float32.
HOSTILE = np.array([[0.0] * 5, [1.0] * 5, [-2.5] * 5, [0.5, -0.5, 0.25, -0.25, 0.0], [1e-30, 0, 0, 0, 1e30]])


def fitted(W, limit, **options):
    if options.get("start") is not None:
        options["start"] = tuple(gpu.to_device(part) for part in options["start"])
    results = fit_rows(gpu.to_device(W), limit, simulate=STANDIN, **options)
    return [np.asarray(gpu.to_host(result)) for result in results]


def assert_fit(W, limit, results, start=None):
    grids, T0, T, errors, steps = results
    alpha, mu, trits, curve = iterative_ternary_fitting(W, limit, start)
    alpha0, mu0, trits0 = start or ternary_init(W)
    np.testing.assert_array_equal(T0, trits0)
    np.testing.assert_array_equal(T, trits)
    scale = np.abs(W).max(axis=1, keepdims=True)
    for column, expected in enumerate((alpha0, mu0, alpha, mu)):
        assert (np.abs(grids[:, column : column + 1] - expected) <= 1e-12 * scale).all()
    assert steps.max() == len(curve)
    np.testing.assert_allclose(errors.sum(axis=1)[: len(curve)], curve, atol=1e-12 * np.square(W).sum())
    np.testing.assert_array_equal(
        errors[steps.max() :], np.broadcast_to(errors[-1], errors[steps.max() :].shape)
    )


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


def test_symmetric_initialization_alone():
    W = np.random.default_rng(4).normal(size=(3, 40)) + 0.3
    grids, T0, T, errors, steps = fitted(W, 0, symmetric=True)
    alpha, trits = symmetric_ternarize(W)
    np.testing.assert_array_equal(T, trits)
    np.testing.assert_array_equal(T0, trits)
    np.testing.assert_allclose(grids, np.hstack([alpha, 0 * alpha, alpha, 0 * alpha]), rtol=1e-13)
    np.testing.assert_allclose(errors[0], np.square(W - alpha * trits).sum(axis=1), rtol=1e-13)
    assert (steps == 1).all()
