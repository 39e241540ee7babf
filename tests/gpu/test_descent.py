"""The descent kernel: in Numba's simulator or on the device, with lanes in any order, and at full sizes."""

import numpy as np
import pytest

import gpu
from gpu.descent import descend
from gpu.device import STANDIN
from gpu.kernels import descent
from gpu.kernels.descent import _build, descend_rows
from reference.descent import MARGIN
from reference.descent import descend as reference_descend
from tests.gpu.ordered_lanes import ORDERS, OrderedLanes
from tests.gpu.whole_rows import Rows, random_rows
from tests.reference.strategies import GRAM_KINDS, quadratic_error

BOTH = pytest.mark.parametrize("simulate", {STANDIN, False})


def descended(case, sweeps=8, simulate=STANDIN):
    """Trits, gradients and number of moves of every row."""
    T, g, alpha, H = (gpu.to_device(array) for array in (case.T.copy(), case.gradients, case.alpha, case.H))
    moves = descend_rows(T, g, alpha, H, case.block_size, sweeps, simulate=simulate)
    return tuple(np.asarray(gpu.to_host(array)) for array in (T, g, moves))


def assert_descended(case, results, sweeps=8):
    T, g, moves = results
    expected = reference_descend(*case, sweeps=sweeps)
    np.testing.assert_array_equal(T, expected)
    scale = np.abs(case.gradients).max() + np.abs(case.H).max() * np.abs(case.alpha).max()
    np.testing.assert_allclose(g, case._replace(T=T).gradients, rtol=0, atol=1e-11 * scale)
    np.testing.assert_array_equal(moves > 0, (expected != case.T).any(axis=1))


@pytest.mark.parametrize(
    ("rows", "columns", "block_size"), [(1, 1, 1), (2, 33, 8), (2, 128, 50), (1, 130, 128), (1, 257, 300)]
)
def test_trits_move_as_in_the_reference(rows, columns, block_size):
    case = random_rows(rows, columns, block_size, spoiled=4)
    assert_descended(case, descended(case))


@pytest.mark.parametrize("sweeps", [0, 1, 2, 8])
@pytest.mark.parametrize("kind", GRAM_KINDS)
@pytest.mark.parametrize(("rows", "columns", "block_size"), [(3, 20, 7), (40, 257, 50), (9, 577, 128)])
def test_full_sizes(rows, columns, block_size, kind, sweeps):
    case = random_rows(rows, columns, block_size, kind)
    case.alpha[0], case.alpha[1, 0] = 0, 0
    assert_descended(case, descended(case, sweeps, simulate=False), sweeps)


def test_many_rows_keep_their_own_trits():
    case = random_rows(300, 40, 16)
    assert_descended(case, descended(case, simulate=False))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("columns", "panel"), [(1, 4), (4, 4), (11, 4), (11, 128), (23, 8)])
def test_lanes_share_a_row_in_any_order(order, columns, panel, monkeypatch):
    monkeypatch.setattr(descent, "PANEL", panel)
    lanes = OrderedLanes(order)
    descend_row = _build(lanes.target)
    case = random_rows(2, columns, 3)
    T, g, moves = case.T.copy(), case.gradients, np.zeros(2, np.int64)
    shared = (np.full(panel, np.nan), np.full(panel, -1), np.full(panel, np.nan))
    shared += (np.full(len(order), -1), np.full(len(order), np.nan))
    arguments = (T, g, case.alpha, case.H, np.diag(case.H).copy(), case.block_size, 8, moves)
    for row in range(2):
        lanes.run(lambda lane, lanes_, row=row: descend_row(*arguments, row, *shared, lane, lanes_))
    assert_descended(case, (T, g, moves))


@BOTH
@pytest.mark.parametrize("scale", [1.0, -2.0])
@pytest.mark.parametrize("taken", [0, 1, 31, 32, 127, 128, 199])
def test_of_equal_inputs_the_first_that_can_moves_alone(taken, scale, simulate):
    """Every column would bring the error to 0, and none is needed after the first."""
    T = np.zeros((1, 200), np.int8)
    T[0, :taken] = 1  # at the end of the grid
    W = scale * T.astype(float)
    W[0, -1] += scale
    case = Rows(W, T, np.full((1, 1), scale), np.zeros((1, 1)), np.ones((200, 200)), 200)
    moved, g, moves = descended(case, simulate=simulate)
    T[0, taken] = 1
    np.testing.assert_array_equal(moved, T)
    assert moves.tolist() == [1]
    assert not g.any()


@BOTH
@pytest.mark.parametrize("later", [1, 40, 130])
def test_a_column_that_a_later_one_pushes_moves_in_the_next_sweep(later, simulate):
    H = np.eye(140)
    H[0, later] = H[later, 0] = -0.3
    # g_0 is 0.4, and 0.7 after the later column has moved by 1; g_later is 1 before.
    g = np.zeros((1, 140))
    g[0, 0], g[0, later] = 0.4, 1.0
    zero = np.zeros((1, 140))
    case = Rows(np.linalg.solve(H, g.T).T, zero.astype(np.int8), np.ones((1, 1)), zero[:, :1], H, 140)
    for sweeps, columns in ((1, [later]), (2, [0, later]), (8, [0, later])):
        T, _, moves = descended(case, sweeps, simulate)
        assert np.flatnonzero(T).tolist() == columns
        assert moves.tolist() == [len(columns)]


@BOTH
@pytest.mark.parametrize("alpha", [1.0, -0.25, 8.0])
@pytest.mark.parametrize("h", [1.0, 4.0])
def test_ties_margin_and_ends_of_the_grid(alpha, h, simulate):
    """One input: the trit nearest to t + z, where a gain must exceed a share of what a step costs."""
    below, above = 0.5 + 0.4 * MARGIN, 0.5 + 0.6 * MARGIN
    cases = [
        (0, 0.5, 0), (0, -0.5, 0), (0, below, 0), (0, -below, 0), (0, above, 1), (0, -above, -1),
        (1, -0.5, 1), (1, -below, 1), (1, -above, 0), (1, -1.5, 0), (1, -1.75, -1), (1, -9.0, -1),
        (-1, 0.5, -1), (-1, above, 0), (-1, 1.5, 0), (-1, 1.75, 1), (-1, 9.0, 1), (1, 9.0, 1), (-1, -9.0, -1),
    ]  # fmt: skip
    T, z, expected = (np.array(column)[:, None] for column in zip(*cases, strict=True))
    if simulate:
        T, z, expected = T[::3], z[::3], expected[::3]
    grid = np.full((len(T), 1), alpha)
    case = Rows(alpha * (T + z), T.astype(np.int8), grid, 0 * grid, np.full((1, 1), h), 1)
    moved, _, moves = descended(case, simulate=simulate)
    assert moved.tolist() == expected.tolist()
    assert moves.tolist() == (T != expected)[:, 0].astype(int).tolist()


@BOTH
def test_rows_without_scale_and_dead_inputs_stay(simulate):
    case = random_rows(2, 6, 3, "white")
    case.alpha[0] = 0
    case.H[[1, 4]] = 0
    case.H[:, [1, 4]] = 0
    T, _, _ = descended(case, simulate=simulate)
    np.testing.assert_array_equal(T[0], case.T[0])
    np.testing.assert_array_equal(T[:, [1, 4]], case.T[:, [1, 4]])
    assert_descended(case, descended(case, simulate=simulate))


def test_no_single_trit_is_left_that_lowers_the_error():
    case = random_rows(4, 9, 4)
    T = gpu.to_host(descend(*map(gpu.to_device, case[:5]), case.block_size, sweeps=100))
    best = quadratic_error(*_reached(case, T), case.H)
    assert best < quadratic_error(*_reached(case, case.T), case.H)
    for row in range(4):
        for column in range(9):
            for trit in (-1, 0, 1):
                other = T.copy()
                other[row, column] = trit
                step = case.alpha[row, column // 4] ** 2 * case.H[column, column]
                assert quadratic_error(*_reached(case, other), case.H) >= best - 1.01 * MARGIN * step


def _reached(case, T):
    residual = case._replace(T=T).residual
    return residual, np.zeros_like(residual)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_arguments_are_left_alone_and_may_be_strided(dtype):
    case = random_rows(5, 21, 4, dtype=dtype)
    given = [np.repeat(np.repeat(array, 2, axis=0), 2, axis=1)[::2, ::2] for array in case[:5]]
    before = [array.copy() for array in given]
    T = gpu.to_host(descend(*map(gpu.to_device, given), case.block_size))
    np.testing.assert_array_equal(T, reference_descend(*case))
    assert T.dtype == np.int8
    for array, copy in zip(given, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_a_negative_number_of_sweeps_is_refused():
    case = random_rows(1, 3, 2)
    with pytest.raises(ValueError, match="sweeps must not be negative, got -1"):
        descend(*map(gpu.to_device, case[:5]), case.block_size, sweeps=-1)
