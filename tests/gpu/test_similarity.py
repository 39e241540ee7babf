"""The kernels of SSR, with 32 lanes in Numba's simulator or on the device, and at full sizes."""

import numpy as np
import pytest

import gpu
from gpu import ssr
from gpu.device import STANDIN
from gpu.kernels.launching import launch
from gpu.kernels.similarity import (
    RIVALS,
    SLAB,
    _build,
    add_products_kernel,
    add_squares_kernel,
    choose_columns,
    compare_columns,
)
from gpu.ssr import select_block
from reference.ssr import block_variance
from reference.ssr import select_block as reference
from tests.gpu.ordered_lanes import ORDERS, OrderedLanes
from tests.gpu.test_memory import peak_of

BOTH = pytest.mark.parametrize("simulate", {STANDIN, False})


def compared(W, done=(), simulate=STANDIN):
    remaining = np.ones(W.shape[1], bool)
    remaining[list(done)] = False
    similarity = compare_columns(gpu.to_device(W), gpu.to_device(remaining), simulate=simulate)
    return np.asarray(gpu.to_host(similarity))


def chosen(similarity, k, simulate=STANDIN):
    indices = choose_columns(gpu.to_device(np.array(similarity, np.float64)), k, simulate=simulate)
    assert indices.dtype == np.int64
    return gpu.to_host(indices).tolist()


def weights(rows, columns, dtype="float64"):
    rng = np.random.default_rng([rows, columns])
    return (rng.normal(size=(rows, columns)) + rng.normal(size=(rows, 1))).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("rows", "columns", "simulate"),
    [(r, c, STANDIN) for r, c in [(1, 1), (3, 2), (2, 127), (3, 128), (1, 129)]]
    + [(130, 151, False), (130, 577, False)],
)
def test_similarities_are_those_of_the_definition(rows, columns, simulate, dtype):
    W = weights(rows, columns, dtype)
    exact = W.astype(np.longdouble)
    expected = exact.T @ exact.sum(axis=1) / np.sqrt(np.square(exact).sum(axis=0))
    got = compared(W, simulate=simulate)
    np.testing.assert_allclose(got, expected.astype(float), rtol=0, atol=1e-13 * abs(exact).sum())
    k = max(1, columns // 3)
    assert chosen(got, k, simulate) == reference(W, k).tolist()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [1, SLAB - 1, SLAB, SLAB + 1, 2 * SLAB, 2 * SLAB + 1])
def test_every_row_is_in_one_slab(rows, dtype):
    # Integers: every order of summation gives the same.
    W = np.random.default_rng(rows).integers(-9, 10, size=(rows, 3)).astype(dtype)
    W[:, 1] = 0
    W[rows - 1, 2] = 5
    row_sums = W.sum(axis=1, dtype=np.float64)
    slabs = -(-rows // SLAB)
    sums = gpu.to_device(np.full((3, slabs, 3), np.nan))
    launch(add_squares_kernel, (1, slabs), gpu.to_device(W), sums)
    launch(add_products_kernel, (1, slabs), gpu.to_device(W), gpu.to_device(row_sums), sums)
    W = W.astype(np.float64)
    unit = W / np.sqrt(np.square(W).sum(axis=0).clip(1))
    for slab in range(slabs):
        part = slice(slab * SLAB, (slab + 1) * SLAB)
        squares, nonzero, products = np.asarray(gpu.to_host(sums))[:, slab]
        np.testing.assert_array_equal(squares, np.square(W[part]).sum(axis=0))
        np.testing.assert_array_equal(nonzero, W[part].any(axis=0))
        np.testing.assert_allclose(products, row_sums[part] @ unit[part], atol=1e-12)
    expected = row_sums @ unit
    expected[1] = -np.inf
    np.testing.assert_allclose(compared(W.astype(dtype), simulate=False), expected, atol=1e-12)


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_columns_that_are_multiples_by_a_power_of_two_tie(dtype, simulate):
    W = weights(3 if simulate else 300, 70, dtype)
    W[:, 69] = W[:, 3]
    W[:, 40] = 8 * W[:, 3]
    W[:, 64] = W[:, 3] / 1024
    similarity = compared(W, simulate=simulate)
    assert len(set(similarity[[3, 40, 64, 69]])) == 1
    assert len(set(similarity)) == 67


@BOTH
def test_columns_of_a_single_row_tie_by_their_sign(simulate):
    similarity = compared(weights(1, 129), simulate=simulate)
    assert len(set(abs(similarity))) == 1


@BOTH
def test_zeros_come_last_and_what_is_done_never(simulate):
    W = weights(2, 40)
    W[:, [0, 5, 33]] = 0
    W[:, 7] = 0
    done = (7, 33)
    similarity = compared(W, done, simulate)
    assert np.isnan(similarity[list(done)]).all()
    assert (similarity[[0, 5]] == -np.inf).all()
    left = np.delete(np.arange(40), done)
    for k in (1, 35, 36, 37, 38):
        assert chosen(similarity, k, simulate) == left[reference(W[:, left], k)].tolist()


@BOTH
def test_columns_that_cancel_come_before_zeros(simulate):
    W = np.array([[0.0, 1.0, 3.0, 0.0, -1.0, -3.0]])
    similarity = compared(W, simulate=simulate)
    assert chosen(similarity, 4, simulate) == reference(W, 4).tolist() == [1, 2, 4, 5]


@BOTH
def test_a_matrix_of_zeros_goes_in_order(simulate):
    similarity = compared(np.zeros((2, 35)), range(3), simulate)
    assert chosen(similarity, 4, simulate) == [3, 4, 5, 6]


@BOTH
def test_a_column_whose_squares_vanish_is_no_column_of_zeros(simulate):
    W = np.array([[1.0, 0.0, 1e-200, -1.0], [1.0, 0.0, 1e-200, -0.5]])
    similarity = compared(W, simulate=simulate)
    assert similarity[1] == -np.inf
    # As in the reference, a norm of 0 does not divide: 1e-200 times the sum of the second row.
    assert similarity[2] == pytest.approx(0.5e-200, rel=1e-12, abs=0)
    assert chosen(similarity, 2, simulate) == reference(W, 2).tolist() == [0, 2]


@BOTH
def test_a_similarity_that_is_no_number_counts_as_one_of_zeros(simulate):
    W = np.array([[1.0, np.nan, 2.0], [1.0, 1.0, -1.0]])
    similarity = compared(W, simulate=simulate)
    assert (similarity == -np.inf).all()
    assert chosen(similarity, 2, simulate) == [0, 1]


@pytest.mark.parametrize(
    ("columns", "simulate"),
    [(c, STANDIN) for c in (1, 2, 31, 32, 33, 127, 128, 129, RIVALS + 1)]
    + [(c, False) for c in (1, 129, RIVALS, 577)],
)
def test_the_highest_are_chosen_and_the_lower_index_on_a_tie(columns, simulate):
    rng = np.random.default_rng(columns)
    similarity = rng.integers(-2, 3, size=columns) / 4
    similarity[rng.random(columns) < 0.2] = -np.inf
    similarity[similarity == 0] *= rng.choice([-1, 1], size=(similarity == 0).sum())  # -0 ties with 0
    done = rng.random(columns) < 0.3
    done[columns // 2] = False
    similarity[done] = np.nan
    left = np.flatnonzero(~done)
    order = sorted(left.tolist(), key=lambda column: (-similarity[column], column))
    for k in {1, len(left) // 2, len(left)} - {0}:
        assert chosen(similarity, k, simulate) == sorted(order[:k])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_strides_do_not_matter(dtype):
    W = weights(12, 30, dtype)
    W[:, 20] = W[:, 4]
    assert (
        gpu.to_host(select_block(gpu.to_device(W)[::2, ::2], 5)).tolist()
        == reference(W[::2, ::2], 5).tolist()
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("columns", [1, 4, 5, 6, 16, 23])
def test_lanes_share_a_row_and_the_choice_in_any_order(order, columns):
    lanes = OrderedLanes(order)
    add_row, _, _, _, count_ahead, collect = _build(lanes.target)
    rng = np.random.default_rng(columns)
    W = rng.integers(-9, 10, size=(3, columns)).astype(np.float64)
    row_sums, partial = np.full(3, np.nan), np.full(len(order), np.nan)
    for row in range(3):
        lanes.run(lambda lane, lanes_, row=row: add_row(W, row_sums, row, partial, lane, lanes_))
    assert row_sums.tolist() == W.sum(axis=1).tolist()

    ranks = np.zeros(columns, np.int32)
    for column in range(columns):
        for first, last in ((0, columns // 2), (columns // 2, columns)):
            ranks[column] += count_ahead(W[0], column, first, last)
    highest = np.argsort(-W[0], kind="stable")
    for k in {1, columns // 2, columns} - {0}:
        indices, found = np.full(k, -1), np.full(len(order), 10**6)
        lanes.run(lambda lane, lanes_, k=indices, f=found: collect(ranks, k, f, lane, lanes_))
        assert indices.tolist() == sorted(highest[:k].tolist())


@pytest.mark.parametrize("elements", [1, 40, 1 << 21])
@pytest.mark.parametrize(("columns", "block_size"), [(8, 4), (10, 4), (3, 8), (5, 1)])
def test_the_variance_of_slabs_of_rows_is_that_of_the_matrix(columns, block_size, elements, monkeypatch):
    monkeypatch.setattr(ssr, "VARIANCE_ELEMENTS", elements)
    W = weights(7, columns)
    got = ssr.block_variance(gpu.to_device(W), block_size)
    assert got == pytest.approx(block_variance(W, block_size), rel=1e-14, abs=0)


def test_no_temporary_has_the_size_of_the_matrix():
    W, remaining = gpu.to_device(weights(10 * SLAB, 64)), gpu.to_device(np.ones(64, bool))
    compare_columns(W, remaining)  # compiles the kernels
    assert 0 < peak_of(lambda: compare_columns(W, remaining)) < W.nbytes / 4
