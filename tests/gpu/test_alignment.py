"""The alignment kernel, with 32 lanes in Numba's simulator or on the device, and at full sizes."""

from fractions import Fraction

import numpy as np
import pytest

import gpu
from gpu.device import STANDIN
from gpu.kernels.alignment import align_rows
from reference.aga import align_grid, output_error
from tests.reference.strategies import GRAM_KINDS, random_gram


def aligned(W, T, C, simulate=STANDIN, symmetric=False):
    W, T, C = (gpu.to_device(array) for array in (W, T, C))
    results = align_rows(W, T, T.astype(np.float64) @ C, C.sum(axis=1), symmetric, simulate)
    return [np.asarray(gpu.to_host(grid)) for grid in results]


def block(rows, columns, dtype="float64"):
    rng = np.random.default_rng([rows, columns])
    W = (rng.normal(size=(rows, columns)) + rng.normal(size=(rows, 1))).astype(dtype)
    T = rng.integers(-1, 2, size=W.shape).astype(np.int8)
    return W, T, random_gram(rng, columns)


def assert_aligned(W, T, C, grids, symmetric=False):
    W = W.astype(np.float64)
    scale = np.abs(W).max(axis=1, keepdims=True)
    for got, expected in zip(grids, align_grid(W, T, C, symmetric), strict=True):
        assert got.shape == expected.shape
        assert (np.abs(got - expected) <= 1e-11 * scale).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 2), (1, 127), (3, 128), (2, 129)])
def test_rows_are_aligned_as_in_the_reference(rows, columns, dtype):
    W, T, C = block(rows, columns, dtype)
    assert_aligned(W, T, C, aligned(W, T, C))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("columns", [151, 577])
def test_full_sizes(columns, dtype):
    W, T, C = block(130, columns, dtype)
    assert_aligned(W, T, C, aligned(W, T, C, simulate=False))


@pytest.mark.parametrize("simulate", {STANDIN, False})
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_are_aligned_without_a_shift_as_in_the_reference(dtype, simulate):
    W, T, C = block(3, 129, dtype)
    T[1] = 0
    T[2, 3:] = 0
    C[:3] = C[:, :3] = 0  # the trits of the last row are those of dead inputs
    grids = aligned(W, T, C, simulate, symmetric=True)
    assert_aligned(W, T, C, grids, symmetric=True)
    assert grids[0][1] == 0
    assert (grids[1] == 0).all()


def test_strides_do_not_matter():
    W, T, C = block(9, 12)
    W, T, C = W[::4, ::2], T[::4, ::2], C[::2, ::2]
    assert_aligned(W, T, C, aligned(W, T, C))


@pytest.mark.parametrize("simulate", {STANDIN, False})
@pytest.mark.parametrize("trit", [-1, 0, 1])
def test_equal_trits_leave_one_unknown(trit, simulate):
    # The least norm: e = w - mean is met by (trit, 1) δ, with δ = e C 1 / ((trit² + 1) 1ᵀ C 1).
    W, _, C = block(2, 6)
    T = np.full(W.shape, trit, np.int8)
    mean = W.mean(axis=1, keepdims=True)
    delta = (W - mean) @ C.sum(axis=1, keepdims=True) / ((trit**2 + 1) * C.sum())
    alpha, mu = aligned(W, T, C, simulate)
    np.testing.assert_allclose(alpha, trit * delta, rtol=0, atol=1e-12)
    np.testing.assert_allclose(mu, mean + delta, rtol=0, atol=1e-12)


@pytest.mark.parametrize("simulate", {STANDIN, False})
def test_no_inputs_correct_nothing(simulate):
    W, T, C = block(2, 5)
    alpha, mu = aligned(W, T, 0 * C, simulate)
    centred = np.stack([T.astype(float), np.ones_like(W)], axis=-1)
    for row in range(2):  # Eq. 9 by least squares
        expected = np.linalg.lstsq(centred[row], W[row], rcond=None)[0]
        np.testing.assert_allclose([alpha[row, 0], mu[row, 0]], expected, rtol=1e-12)


@pytest.mark.parametrize("simulate", {STANDIN, False})
def test_a_system_in_fractions(simulate):
    W = np.array([[3.0, -1.0, 0.5, 2.0, -4.0]])
    T = np.array([[1, 0, 1, -1, -1]], np.int8)
    X = np.array([[1, 2, 0, -1, 3], [0, 1, 1, 4, -2], [2, 0, -3, 1, 1], [1, 1, 1, 0, 5]])
    C = [[Fraction(int(entry)) for entry in row] for row in X.T @ X]
    w, t = [Fraction(value) for value in W[0]], [Fraction(int(value)) for value in T[0]]

    def form(u, v):
        return sum(u[i] * C[i][j] * v[j] for i in range(5) for j in range(5))

    one = [Fraction(1)] * 5
    a, b, c = form(t, t), form(t, one), form(one, one)
    determinant = a * c - b * b
    expected = (
        (c * form(w, t) - b * form(w, one)) / determinant,
        (a * form(w, one) - b * form(w, t)) / determinant,
    )
    alpha, mu = aligned(W, T, (X.T @ X).astype(float), simulate)
    np.testing.assert_allclose([alpha[0, 0], mu[0, 0]], [float(value) for value in expected], rtol=1e-13)


@pytest.mark.parametrize("kind", GRAM_KINDS)
def test_the_cost_is_that_of_the_reference_on_every_kind_of_gram_matrix(kind):
    W, T, _ = block(3, 33)
    T[0] = 1
    C = random_gram(np.random.default_rng(5), 33, kind)
    alpha, mu = aligned(W, T, C)
    alpha_reference, mu_reference = align_grid(W, T, C)
    power = output_error(W, np.zeros_like(W), C)
    error = output_error(W, alpha * T + mu, C)
    assert abs(error - output_error(W, alpha_reference * T + mu_reference, C)) <= 1e-12 * power
