"""Inverses by their Cholesky factors, panel by panel."""

import numpy as np
import pytest

import gpu
from gpu import gptq
from gpu.device import cholesky

PANEL = 4


@pytest.fixture(params=[1, 3, 4, 5, 8, 13])
def size(request, monkeypatch):
    monkeypatch.setattr(gptq, "PANEL", PANEL)
    return request.param


def test_an_inverse_of_whole_numbers_is_exact(size):
    # Of L with ones on the diagonal the inverse is whole, and so is every sum on the way.
    rng = np.random.default_rng(size)
    L = np.tril(rng.integers(-2, 3, size=(size, size)), -1) + np.eye(size)
    exact = np.eye(size, dtype=object)
    for row in range(size):  # forward substitution in Python's integers
        for column in range(row):
            exact[row] = exact[row] - int(L[row, column]) * exact[column]
    expected = exact.T.dot(exact).astype(float)
    assert abs(expected).max() < 2**50
    np.testing.assert_array_equal(gpu.to_host(gptq.inverse_by_factor(gpu.to_device(L))), expected)


def test_it_is_the_inverse_of_what_was_factored(size):
    rng = np.random.default_rng(size)
    X = rng.normal(size=(4 * size, size))
    C = X.T @ X
    inverse = gpu.to_host(gptq.inverse_by_factor(cholesky(gpu.to_device(C))))
    np.testing.assert_allclose(inverse @ C, np.eye(size), atol=1e-11)


def test_the_factor_itself_is_overwritten():
    # A second square matrix beside it would be one too many at the size of a model's.
    L = gpu.to_device(np.diag([1.0, 2.0, 4.0]))
    assert gptq.inverse_by_factor(L) is L
    np.testing.assert_array_equal(gpu.to_host(L), np.diag([1, 0.25, 0.0625]))
