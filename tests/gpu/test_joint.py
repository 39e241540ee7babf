"""The joint grid of whole rows: sums over blocks, systems, and what they bring."""

import numpy as np
import pytest

import gpu
from gpu import joint
from gpu.device import STANDIN, solve_systems
from gpu.kernels.segments import _build, match_rows
from reference.joint import align_jointly as reference
from reference.joint import damped_objective, spread
from tests.gpu.ordered_lanes import ORDERS, OrderedLanes
from tests.gpu.whole_rows import random_rows
from tests.reference.strategies import GRAM_KINDS, quadratic_error, random_gram

SHAPES = [(1, 1, 1), (3, 2, 1), (2, 20, 7), (40, 129, 128), (7, 151, 50), (300, 12, 5), (5, 30, 100)]


def aligned(case, symmetric=False):
    grids = joint.align_jointly(*map(gpu.to_device, case[:5]), case.block_size, symmetric)
    return [np.asarray(gpu.to_host(grid)) for grid in grids]


def error_of(case, alpha, mu):
    columns = case.W.shape[1]
    W_hat = spread(alpha, columns, case.block_size) * case.T + spread(mu, columns, case.block_size)
    return quadratic_error(case.W, W_hat, case.H)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_grids_are_those_of_the_reference(shape, dtype, symmetric):
    case = random_rows(*shape, dtype=dtype)
    for got, expected in zip(aligned(case, symmetric), reference(*case, symmetric), strict=True):
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("kind", GRAM_KINDS)
def test_rows_without_a_scale_and_every_kind_of_gram_matrix(kind):
    case = random_rows(6, 23, 5, kind)
    case.T[0], case.T[1], case.T[2, :5] = 0, -1, 0
    power = quadratic_error(case.W, 0 * case.W, case.H)
    ours, theirs = error_of(case, *aligned(case)), error_of(case, *reference(*case))
    assert ours == pytest.approx(theirs, abs=1e-11 * power)
    if kind == "zero":
        np.testing.assert_array_equal(aligned(case), (case.alpha, case.mu))


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 7])
def test_rows_may_be_solved_some_at_a_time(rows_at_once, monkeypatch):
    case = random_rows(7, 23, 5)
    whole = aligned(case)
    monkeypatch.setattr(joint, "SYSTEM_BYTES", rows_at_once * 8 * 10**2)
    sizes = []
    monkeypatch.setattr(joint, "solve_systems", lambda A, b: sizes.append(len(A)) or solve_systems(A, b))
    np.testing.assert_allclose(aligned(case), whole, rtol=1e-12)
    assert sum(sizes) == 7
    assert max(sizes) == rows_at_once


def test_repeated_it_reaches_dense_least_squares():
    case = random_rows(3, 13, 4)
    alpha, mu = case.alpha, case.mu
    for _ in range(30):
        alpha, mu = aligned(case._replace(alpha=alpha, mu=mu))
    root = np.linalg.cholesky(case.H).T
    for row in range(3):
        blocks = np.repeat(np.eye(4), 4, axis=1)[:, :13]
        P = np.vstack([blocks * case.T[row], blocks])
        best = np.linalg.lstsq(root @ P.T, root @ case.W[row], rcond=None)[0]
        W_hat = np.hstack([alpha[row], mu[row]]) @ P
        np.testing.assert_allclose(W_hat, best @ P, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rows_at_once", [2, 5])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_fall_is_that_of_the_error(rows_at_once, symmetric, monkeypatch):
    monkeypatch.setattr(joint, "SYSTEM_BYTES", rows_at_once * 8 * 8**2)
    case = random_rows(5, 23, 6, "correlated")
    T, g, alpha, mu, H = map(gpu.to_device, (case.T, case.gradients, case.alpha, case.mu, case.H))
    new_alpha, new_mu, fall = joint.corrected(T, g, alpha, mu, H, joint.Ones(H, 6, symmetric))
    before, after = (
        error_of(case, case.alpha, case.mu),
        error_of(case, *map(gpu.to_host, (new_alpha, new_mu))),
    )
    assert float(fall) == pytest.approx(before - after, rel=1e-10)


@pytest.mark.parametrize("size", [1, 10, 300])
def test_systems_of_any_size_are_solved_together(size):
    rng = np.random.default_rng(size)
    A = np.stack([random_gram(rng, size) for _ in range(3)])
    B = rng.normal(size=(3, size))
    x = gpu.to_host(solve_systems(gpu.to_device(A), gpu.to_device(B)))
    np.testing.assert_allclose(np.einsum("rij,rj->ri", A, x), B, rtol=0, atol=1e-11 * np.abs(B).max())


@pytest.mark.parametrize("simulate", {STANDIN, False})
@pytest.mark.parametrize(
    ("rows", "columns", "first", "block_size"), [(1, 1, 0, 1), (2, 40, 0, 33), (3, 23, 5, 5), (1, 9, 4, 100)]
)
def test_sums_over_blocks(rows, columns, first, block_size, simulate):
    rng = np.random.default_rng(columns)
    T = rng.integers(-1, 2, (rows, columns)).astype(np.int8)
    P = rng.normal(size=(rows, columns - first))
    expected = np.add.reduceat(P * T[:, first:], np.arange(0, columns - first, block_size), axis=1)
    sums = match_rows(gpu.to_device(P), gpu.to_device(T), first, block_size, simulate=simulate)
    np.testing.assert_allclose(gpu.to_host(sums), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_share_a_block_in_any_order(order):
    lanes = OrderedLanes(order)
    match_segment = _build(lanes.target)
    rng = np.random.default_rng(0)
    P, T = rng.normal(size=(1, 23)), rng.integers(-1, 2, (1, 23)).astype(np.int8)
    sums, partial = np.full((1, 3), np.nan), np.full(len(order), np.nan)
    for block in range(3):
        lanes.run(
            lambda lane, lanes_, block=block: match_segment(P, T, 0, 9, sums, 0, block, partial, lane, lanes_)
        )
    np.testing.assert_allclose(sums, np.add.reduceat(P * T, [0, 9, 18], axis=1), rtol=1e-12)


@pytest.mark.parametrize("kind", ["white", "dead", "zero"])
def test_dead_inputs_have_no_weight_in_the_objective(kind):
    C = random_gram(np.random.default_rng(1), 9, kind)
    given = gpu.to_device(C)
    H = gpu.to_host(joint.damped_objective(given, 0.25))
    np.testing.assert_array_equal(H, damped_objective(C, 0.25))
    np.testing.assert_array_equal(gpu.to_host(given), C)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_column_gets_the_value_of_its_block(dtype):
    grid = np.arange(6).reshape(2, 3).astype(dtype)
    wide = gpu.to_host(joint.spread(gpu.to_device(grid), 8, 3))
    assert wide.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2], [3, 3, 3, 4, 4, 4, 5, 5]]
    assert wide.dtype == np.float64
    with pytest.raises(ValueError, match=r"grid has shape \(2, 3\), expected \(2, 4\)"):
        joint.spread(gpu.to_device(grid), 10, 3)


def test_the_whole_error():
    case = random_rows(4, 1100, 128)
    W_hat = case.W - case.residual
    got = joint.whole_error(*map(gpu.to_device, (case.W, W_hat, case.H)))
    assert got == pytest.approx(quadratic_error(case.W, W_hat, case.H), rel=1e-11)
