"""alpha and mu in 8 bits."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reference.grids import encode, row_factor
from reference.types import CODE_LIMIT, CodedGrid, TernaryConfig


def test_the_factor_of_a_row_is_its_root_mean_square():
    W = np.array([[3.0, 4.0, 0.0, 0.0], [0.0] * 4, [-2.0] * 4])
    assert row_factor(W).tolist() == [[2.5], [0.0], [2.0]]
    assert row_factor(W).dtype == np.float16


def test_weights_beyond_float16_are_refused():
    with pytest.raises(ValueError, match="the weights of row 1 have a root mean square of 1e\\+06"):
        row_factor([[1.0, 1.0], [1e6, -1e6]])
    with pytest.raises(ValueError, match="1e\\+09 times its row's weights, beyond float16"):
        encode([[1e9]], np.array([[1.0]], dtype=np.float16))


def test_values_are_read_back_as_products_in_order():
    row, block = np.float16(0.1), np.float16(0.3)
    grid = CodedGrid(np.array([[-127, 3]], np.int8), np.array([[row]]), np.array([[block, block]]))
    # The product of the factors is exact in float32; that with the code is rounded once.
    for code, value in zip((-127, 3), grid.decode()[0], strict=True):
        exact = Fraction(float(row)) * Fraction(float(block)) * code
        assert value == np.float32(float(exact))
    assert grid.decode().dtype == np.float32


@given(
    st.lists(st.floats(-8, 8, allow_subnormal=False), min_size=1, max_size=6),
    st.lists(st.floats(0.01, 100), min_size=6, max_size=6),
)
def test_every_value_goes_to_the_nearest_code(values, sizes):
    row = np.array(sizes[: len(values)], dtype=np.float16)[:, None]
    value = np.array(values)[:, None] * row.astype(float)
    # A subnormal factor of the block is rounded by more: `test_codes_end_where_the_factor_is_rounded_down`.
    largest = max(map(abs, values))
    assume(largest == 0 or largest >= CODE_LIMIT * 2.0**-14)
    grid = encode(value, row)
    assert np.abs(grid.codes).max() <= CODE_LIMIT
    step = row.astype(float) * grid.block.astype(float)
    if grid.block[0, 0] > 0:
        # The factor of the block is rounded to float16, which may cut the largest by 2^-11 of it.
        slack = np.abs(value) * 2.0**-11
        assert (np.abs(grid.decode() - value) <= step / 2 * (1 + 1e-6) + slack).all()
    assert (np.abs(grid.codes).max() >= CODE_LIMIT - 1) == (grid.block[0, 0] > 0)


def test_rows_of_zeros_and_blocks_of_zeros_are_zero():
    row = np.array([[0.0], [1.0]], dtype=np.float16)
    mixed, zero = encode([[3.0], [0.5]], row), encode([[0.0], [0.0]], row)
    assert mixed.decode()[0, 0] == 0
    assert (zero.decode() == 0).all()
    # What a row of zeros is asked for counts neither in its codes nor in the factor of the block.
    assert mixed.codes.tolist() == [[0], [127]]
    assert mixed.block == np.float16(0.5 / 127)
    assert zero.codes.tolist() == [[0], [0]]


def test_a_block_whose_factor_vanishes_is_zero_and_one_of_factor_one_is_its_codes():
    row = np.ones((2, 1), np.float16)
    small, exact = encode([[1e-7], [-1e-7]], row), encode([[127.0], [-64.0]], row)
    assert small.block == 0
    assert small.codes.tolist() == [[0], [0]]
    assert exact.block == 1
    assert exact.codes.tolist() == [[127], [-64]]


def test_codes_end_where_the_factor_is_rounded_down():
    # The factor of the block is 1.4 of float16's least step and rounded to one.
    least = 2.0**-24
    grid = encode([[1.4 * 127 * least], [-1.4 * 127 * least], [least]], np.ones((3, 1), np.float16))
    assert grid.block == least
    assert grid.codes.tolist() == [[127], [-127], [1]]


def test_lists_are_taken():
    grid = encode([[3.0], [0.5], [-0.25]], [[0.0], [1.0], [2.0]])
    assert grid.codes.tolist() == [[0], [127], [-32]]  # -0.125 of 0.5, in 127 steps, is -31.75
    step = float(np.float16(0.5 / 127))
    assert grid.decode().tolist() == [[0.0], [127 * step], [-32 * 2 * step]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_or_fits_no_row_is_refused(bad):
    row = np.ones((2, 1), np.float16)
    with pytest.raises(ValueError, match=r"W\[1, 0\] is (nan|inf)"):
        row_factor([[1.0, 2.0], [bad, 3.0]])
    with pytest.raises(ValueError, match="W must be a non-empty matrix"):
        row_factor([1.0, 2.0])
    with pytest.raises(ValueError, match=r"value\[1, 0\] is (nan|inf)"):
        encode([[1.0], [bad]], row)
    for value in ([[1.0]], [[1.0, 2.0], [3.0, 4.0]]):
        with pytest.raises(ValueError, match=r"value has shape .* expected \(2, 1\)"):
            encode(value, row)


def test_an_unknown_grid_is_refused():
    with pytest.raises(ValueError, match="grid must be one of float16, int8, got 'int4'"):
        TernaryConfig(grid="int4")
