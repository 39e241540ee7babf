"""The plain kernel by itself: which one runs, on how much at a time, and with grids of any type."""

from __future__ import annotations

import numpy as np
import pytest

import gpu
from gpu import matmul
from gpu.device import STANDIN
from gpu.kernels import product
from gpu.kernels.choice import UNPACKED_TOKENS
from gpu.layout import join
from tests.gpu.ternary_cases import Case, coded_case, lay_out, random_case

standin = pytest.mark.skipif(not STANDIN, reason="counts calls of the CPU's body")


def whole_numbers(rows, columns, block_size):
    """A matrix of small whole numbers, whose products with such are exact."""
    rng = np.random.default_rng([rows, columns])
    trits = rng.integers(-1, 2, size=(rows, columns)).astype(np.int8)
    scale, shift = rng.integers(-4, 5, size=(2, rows, -(-columns // block_size))).astype(np.float16)
    return Case(trits, scale, shift, rng.permutation(columns), block_size)


def dense(case):
    W = np.empty(case.trits.shape)
    blocks = np.arange(case.trits.shape[1]) // case.block_size
    scale, shift = case.grid
    W[:, case.permutation] = scale[:, blocks] * case.trits + shift[:, blocks]
    return W


@pytest.fixture
def calls(monkeypatch):
    """Tokens and tiles of every call of the CPU's body."""
    seen = []
    body = product._multiply_cpu

    def note(x, words, *rest):
        seen.append((len(x), len(words)))
        body(x, words, *rest)

    monkeypatch.setattr(product, "_multiply_cpu", note)
    return seen


@standin
def test_the_simulator_runs_where_it_is_asked_for_and_nowhere_else(monkeypatch):
    case = whole_numbers(2, 70, 64)
    x = np.arange(140.0).reshape(2, 70)
    with monkeypatch.context() as patch:
        patch.setattr(product, "_multiply_cpu", lambda *arguments: pytest.fail("the CPU's body"))
        np.testing.assert_array_equal(product.multiply(x, lay_out(case), simulate=True), x @ dense(case).T)
    monkeypatch.setattr(product, "multiply_kernel", None)
    np.testing.assert_array_equal(product.multiply(x, lay_out(case)), x @ dense(case).T)


@standin
@pytest.mark.parametrize("columns", [2, 40])
@pytest.mark.parametrize(("tokens", "portions"), [(8, [3, 3, 2]), (9, [3, 3, 3]), (1, [1])])
def test_more_tokens_than_a_grid_has_rows_are_taken_in_portions(
    tokens, portions, columns, calls, monkeypatch
):
    monkeypatch.setattr(product, "MOST_TOKENS", 3)
    case = whole_numbers(5, columns, 64)
    x = np.random.default_rng(0).integers(-9, 10, size=(tokens, columns)).astype(float)
    np.testing.assert_array_equal(product.multiply(x, lay_out(case)), x @ dense(case).T)
    assert [count for count, _ in calls] == portions


@standin
def test_a_part_is_given_its_own_tiles(calls):
    cases = [whole_numbers(rows, 70, 64) for rows in (33, 5, 96)]
    x = np.random.default_rng(0).integers(-9, 10, size=(2, 70)).astype(float)
    y = product.multiply(x, join([lay_out(case) for case in cases]))
    np.testing.assert_array_equal(y, np.hstack([x @ dense(case).T for case in cases]))
    assert [tiles for _, tiles in calls] == [2, 1, 3]


@pytest.mark.parametrize("trit", [-1, 0, 1])
def test_grids_in_float64_are_not_rounded(trit):
    alpha, mu = 1 + 2.0**-40, 2.0**-10 + 2.0**-40
    case = Case(np.array([[trit]], np.int8), np.array([[alpha]]), np.array([[mu]]), np.array([0]), 9)
    y = gpu.to_host(product.multiply(gpu.to_device(np.ones((1, 1))), lay_out(case)))
    assert y[0, 0] == alpha * trit + mu


@pytest.mark.parametrize("columns", [1, 255, 257])
def test_what_fills_up_an_order_names_a_column_that_is_there(columns):
    order = gpu.to_host(lay_out(random_case(2, columns, 128)).permutation)
    assert order.shape == (1, -(-columns // 256) * 256)
    assert (order[0, columns:] == 0).all()


@pytest.mark.parametrize("make", [random_case, coded_case])
@pytest.mark.parametrize(("alpha", "mu"), [(-60000, 20000), (20000, -60000)])
def test_weights_beyond_float16_are_found_by_their_magnitude_and_in_any_part(alpha, mu, make):
    fits, beyond = make(3, 70, 64), random_case(3, 70, 64)
    beyond.scale[1, 0], beyond.shift[1, 0] = alpha, mu
    assert lay_out(fits).in_float16
    assert not lay_out(beyond).in_float16
    if make is random_case:
        for parts in ([fits, beyond], [beyond, fits]):
            assert not join([lay_out(part) for part in parts]).in_float16
        assert join([lay_out(fits), lay_out(fits)]).in_float16


@standin
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_without_a_device_nothing_is_unpacked(dtype):
    case = random_case(3, 70, 64)
    x = gpu.to_device(case.activations(UNPACKED_TOKENS, dtype))
    assert not matmul.prefers_unpacked(x, lay_out(case))
