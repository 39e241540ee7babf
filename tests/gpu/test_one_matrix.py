"""One matrix start to end, where the configurations of `test_ternarize` cannot tell."""

import numpy as np
import pytest

import gpu.ternarize as module
from gpu.device import cholesky
from harness.backends import load_backend
from reference.ternarize import ternarize
from reference.types import TernaryConfig
from tests.reference.strategies import random_gram


def on_gpu(W, C, config):
    """From NumPy arrays to NumPy arrays; W as it is."""
    backend = load_backend("gpu")
    return backend.to_host(backend.ternarize(np.asarray(W), np.array(C, dtype=np.float64), config))


def test_error_passed_on_is_that_of_the_float32_sum():
    """By hand: scale and shift are exact in float16, so only their sum in float32 makes an error."""
    alpha, mu = 819 / 8192, 60000.0
    W = [[mu + alpha, mu - alpha, 0.0]]
    C = [[2.0, 0.0, 1.0], [0.0, 2.0, 0.0], [1.0, 0.0, 1.0]]
    result = on_gpu(W, C, TernaryConfig(2, reorder="none", aga="none", damping=0))
    assert (result.scale[0, 0], result.shift[0, 0]) == (alpha, mu)
    # Near 60000 float32 has steps of 1/256: mu + alpha becomes mu + 832/8192, and C_02 / C_22 = 1 of
    # the error 819/8192 - 832/8192 goes to the last column.
    assert result.shift[0, 1] == -13 / 8192


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_block_that_lost_its_factor_is_an_error(monkeypatch, bad):
    blocks = iter(range(3))

    def stopped(A):
        L = cholesky(A)
        return L if next(blocks) != bad else 2 * L

    monkeypatch.setattr(module, "cholesky", stopped)
    rng = np.random.default_rng(0)
    with pytest.raises(
        np.linalg.LinAlgError, match=r"inverse of H has no Cholesky factor, with damping 0\.01"
    ):
        on_gpu(rng.normal(size=(2, 10)), random_gram(rng, 10), TernaryConfig(4))
    assert next(blocks, None) is None


@pytest.mark.parametrize("aga", ["exact", "conditional"])
def test_rows_of_equal_trits_are_aligned_as_in_the_reference(aga):
    rng = np.random.default_rng(1)
    # All weights of a row are beyond three quarters of their mean: from zero, every trit is 1.
    W, C = 1 + 0.1 * rng.uniform(-1, 1, size=(3, 12)), random_gram(rng, 12)
    config = TernaryConfig(5, start="twn", itf=False, aga=aga)
    ours, theirs = on_gpu(W, C, config), ternarize(W, C, config)
    assert (theirs.trits == 1).all()
    for part in ("trits", "scale", "shift", "permutation"):
        np.testing.assert_array_equal(getattr(ours, part), getattr(theirs, part), err_msg=part)


def test_shares_do_not_depend_on_the_size_of_the_weights():
    rng = np.random.default_rng(3)
    W, C = rng.normal(size=(3, 8)), random_gram(rng, 8)
    # A power of two that leaves float16 scales normal; the power of W falls below 1.
    small, large = (on_gpu(W * size, C, TernaryConfig(4)).report for size in (2.0**-6, 1.0))
    assert small.weight_power < 1
    assert small.weight_errors == pytest.approx(large.weight_errors, rel=1e-12)
    assert small.aligned_weight_error == pytest.approx(large.aligned_weight_error, rel=1e-12)
    assert small.output_errors == pytest.approx(large.output_errors, rel=1e-12)


def test_errors_of_float32_weights_are_float64():
    rng = np.random.default_rng(4)
    W, C = rng.normal(size=(40, 96)).astype(np.float32), random_gram(rng, 96)
    result = on_gpu(W, C, TernaryConfig(32))
    E = W.astype(np.float64) - result.dequantize()
    exact = W.astype(np.float64)
    power = ((exact @ C) * exact).sum()
    assert result.report.output_power == pytest.approx(power, rel=1e-13)
    # In float32 each difference would round by 6e-8 of itself.
    assert result.report.relative_output_error == pytest.approx(((E @ C) * E).sum() / power, rel=1e-12)


@pytest.mark.parametrize(
    ("row", "block", "weights", "name", "shown"),
    [
        # Mean 0 and trits at ±7e4: a scale beyond 65504.
        (2, 1, [7e4, -7e4, 7e4, -7e4], "scale", "70000"),
        (0, 2, [7e4, 7e4, 7e4, 7e4], "shift", "70000"),
        (1, 0, [-7e4, -7e4, -7e4, -7e4], "shift", "-70000"),
    ],
)
def test_grid_beyond_float16_is_an_error_that_names_row_and_block(row, block, weights, name, shown):
    W = np.random.default_rng(9).normal(size=(3, 12))
    W[row, 4 * block : 4 * block + 4] = weights
    config = TernaryConfig(4, reorder="none", aga="none", compensation=False)
    with pytest.raises(ValueError, match=f"the {name} of row {row}, block {block} is {shown}, beyond"):
        on_gpu(W, np.eye(12), config)
