"""Factorizations that fail, and how that is noticed without asking cuSOLVER."""

import numpy as np
import pytest

import gpu
from gpu.device import cholesky, is_factor, solve_lower, subtract_product
from gpu.gptq import compensate, invert_damped
from reference import gptq as reference

SYMMETRIC = np.array([[4.0, 2.0, 1.0], [2.0, 5.0, 3.0], [1.0, 3.0, 6.0]])


def test_a_factor_is_one():
    A = gpu.to_device(SYMMETRIC)
    L = cholesky(A)
    assert is_factor(L, A.diagonal())
    host = gpu.to_host(L)
    np.testing.assert_allclose(host @ host.T, SYMMETRIC, rtol=1e-14)
    np.testing.assert_allclose(
        gpu.to_host(solve_lower(L, A.copy())), np.linalg.solve(host, SYMMETRIC), rtol=1e-13
    )


def test_a_factorization_that_stopped_half_way_is_none():
    # One column done and the rest as it was, with a diagonal that could be a factor's.
    stopped = np.array([[2.0, 0.0, 0.0], [1.0, 5.0, 0.0], [0.5, 3.0, 6.0]])
    assert not is_factor(gpu.to_device(stopped), gpu.to_device(np.diag(SYMMETRIC)))


@pytest.mark.parametrize("value", [np.nan, -1.0, 0.0])
def test_an_impossible_diagonal_is_none(value):
    L = np.linalg.cholesky(SYMMETRIC)
    L[2, 2] = value
    assert not is_factor(gpu.to_device(L), gpu.to_device(np.square(L).sum(axis=1)))


def test_of_many_factors_all_must_be_some():
    L = np.linalg.cholesky([SYMMETRIC, 4 * SYMMETRIC, SYMMETRIC / 4])
    diagonals = np.square(L).sum(axis=2)
    assert is_factor(gpu.to_device(L), gpu.to_device(diagonals))
    L[1, 2, 2] *= -1
    assert not is_factor(gpu.to_device(L), gpu.to_device(diagonals))
    L[1, 2, 2] *= -1.1
    assert not is_factor(gpu.to_device(L), gpu.to_device(diagonals))


def test_an_indefinite_matrix_has_no_factor():
    A = gpu.to_device(SYMMETRIC - 3 * np.eye(3))
    assert not is_factor(cholesky(A), A.diagonal())


def test_a_matrix_that_is_singular_to_rounding_is_refused_as_in_the_reference():
    C = np.array([[1.0, 1.0], [1.0, 1.0 + np.finfo(float).eps]])  # has a factor nonetheless
    assert np.isfinite(np.linalg.cholesky(C)).all()
    for invert, matrix in ((reference.invert_damped, C), (invert_damped, gpu.to_device(C))):
        with pytest.raises(np.linalg.LinAlgError, match="not positive definite with damping 0;"):
            invert(matrix, 0.0)
        assert invert(matrix, 1e-3)[1] == 1e-3


def test_an_indefinite_block_is_an_error():
    W = gpu.to_device(np.ones((1, 3)))
    bad = gpu.to_device(np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    with pytest.raises(np.linalg.LinAlgError, match="Hinv_BB is not positive definite"):
        compensate(W, W, bad, gpu.to_device(np.eye(3)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(1, 1, 1), (1, 3, 7), (7, 3, 1), (5, 1, 4), (40, 9, 70)]
)
def test_a_product_is_subtracted_in_place(rows, inner, columns, dtype):
    rng = np.random.default_rng(rows)
    # Integers: float32 is exact too.
    C, A, B = (
        rng.integers(-9, 10, size=shape).astype(dtype)
        for shape in ((rows, columns), (rows, inner), (inner, columns))
    )
    for transposed in (False, True):
        place = gpu.to_device(C.copy())
        left = gpu.to_device(np.ascontiguousarray(A.T)).T if transposed else gpu.to_device(A)
        subtract_product(place, left, gpu.to_device(B))
        np.testing.assert_array_equal(gpu.to_host(place), C - A @ B)
        assert place.dtype == dtype


def test_what_stays_symmetric():
    half = np.random.default_rng(0).normal(size=(5, 33))
    place = gpu.to_device(np.eye(33))
    on_device = gpu.to_device(half)
    subtract_product(place, on_device.T, on_device)
    result = gpu.to_host(place)
    np.testing.assert_allclose(result, result.T, rtol=0, atol=1e-14)
    np.testing.assert_allclose(result, np.eye(33) - half.T @ half, rtol=0, atol=1e-14)
