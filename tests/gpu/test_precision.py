"""Types: what is float64 however the weights come, and what is exactly zero."""

import numpy as np
import pytest

import gpu
from gpu import aga, atq, checks, gptq, ssr


def test_sums_of_float32_are_float64():
    # 2^24 + 1 is no float32.
    row = gpu.to_device(np.array([[2.0**24, 1.0]], dtype=np.float32))
    norm = atq.squared_norm(gpu.to_device(np.array([[2.0**12, 1.0]], dtype=np.float32)))
    assert float(norm) == 2.0**24 + 1
    alpha, mu = atq.build_optimal_grid(row, gpu.to_device(np.zeros((1, 2), np.int8)))
    assert (alpha.item(), mu.item()) == (0.0, 2.0**23 + 0.5)
    assert ssr.block_variance(row, 2) == (2.0**23 - 0.5) ** 2
    assert gptq.gram(row).tolist() == [[2.0**48, 2.0**24], [2.0**24, 1.0]]
    assert gptq.gram(gpu.to_device(np.array([[2.0**12], [1.0]], dtype=np.float32))).item() == 2.0**24 + 1


def test_what_has_been_checked_has_the_type_that_is_computed_with():
    float32 = gpu.to_device(np.eye(2, dtype=np.float32))
    assert checks.matrix(float32, "W").dtype == np.float32
    assert checks.gram(float32, 2).dtype == np.float64
    assert checks.column(float32[:, :1], 2, "alpha").dtype == np.float64
    assert checks.trits(float32, (2, 2)).dtype == np.int8


def test_grids_and_gradients_of_float32_are_float64():
    W, C = gpu.to_device(np.ones((1, 2), np.float32)), gpu.to_device(np.eye(2, dtype=np.float32))
    T, grid = gpu.to_device(np.array([[1, 0]])), gpu.to_device(np.full((1, 1), 0.1, np.float32))
    results = (
        *atq.build_optimal_grid(W, T),
        *atq.weight_error_gradient(W, grid, grid, T),
        *aga.align_grid(W, T, C),
        *aga.output_error_gradient(W, grid, grid, T, C),
    )
    assert {part.dtype for part in results} == {np.dtype(np.float64)}


@pytest.mark.parametrize("trit", [-1, 0, 1])
def test_rows_of_equal_trits_have_exactly_no_scale(trit):
    # Distances from the mean of this row do not add up to 0 in float64.
    row = np.array([[0.1, 0.2, 0.7, 1.3]])
    assert (row - row.mean()).sum() != 0
    alpha, mu = atq.build_optimal_grid(gpu.to_device(row), gpu.to_device(np.full((1, 4), trit)))
    assert alpha.item() == 0
    assert mu.item() == pytest.approx(0.575, rel=1e-15)
