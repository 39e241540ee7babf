"""alpha and mu in 8 bits against the reference, where whole matrices cannot tell."""

from fractions import Fraction

import numpy as np
import pytest

import gpu
from gpu import ternarize
from gpu.grids import coded, encode, row_factor
from reference import grids as reference
from reference.types import CODE_LIMIT

LEAST = 2.0**-24  # of float16


def assert_coded(value, row):
    """The grid is the reference's, and nothing is divided by zero on the way."""
    expected = reference.encode(value, row)
    with np.errstate(divide="raise", invalid="raise"):
        grid = encode(gpu.to_device(value), gpu.to_device(row))
    for part in ("codes", "row", "block"):
        got = gpu.to_host(getattr(grid, part))
        np.testing.assert_array_equal(got, getattr(expected, part))
        assert (got.dtype, got.shape) == (getattr(expected, part).dtype, getattr(expected, part).shape)
    return gpu.to_host(grid.codes)


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_values_of_rows_of_all_sizes(rows):
    rng = np.random.default_rng(rows)
    for size in (1.0, 1e-3, 100.0):
        row = (size * rng.uniform(0.1, 3, size=(rows, 1))).astype(np.float16)
        value = row * rng.normal(size=(rows, 1))
        assert abs(assert_coded(value, row)).max() >= CODE_LIMIT - 1
        assert_coded(-abs(value), row)
        row[0] = 0
        assert assert_coded(value, row)[0] == 0


def test_ties_of_codes():
    value = np.array([[127.0], [0.5], [1.5], [2.5], [-0.5], [-1.5]])
    codes = assert_coded(value, np.ones((6, 1), np.float16))
    assert codes[:, 0].tolist() == [127, 0, 2, 2, 0, -2]


def test_factors_at_the_end_of_float16():
    row = np.ones((3, 1), np.float16)
    # The factor is 1.4 of the least step there is, and rounded to one.
    codes = assert_coded(np.array([[1.4 * 127], [-1.4 * 127], [1.0]]) * LEAST, row)
    assert codes[:, 0].tolist() == [127, -127, 1]
    # Less than half of that step.
    assert not assert_coded(np.array([[60.0], [-1.0], [0.0]]) * LEAST, row).any()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_value_that_is_not_finite_has_a_factor_that_is_refused_later(bad):
    row = gpu.to_device(np.ones((2, 1), np.float16))
    with np.errstate(invalid="raise"):
        grid = coded(gpu.to_device(np.array([[bad], [1.0]])), row)
    assert not np.isfinite(gpu.to_host(grid.block)).any()
    assert gpu.to_host(grid.codes).tolist() == [[0], [0]]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_scale_or_a_shift_beyond_8_bits_is_refused(which, sign):
    row = np.ones((2, 1), np.float16)
    grids = np.ones((2, 2, 3))
    grids[which, 1, 2] = sign * 1e9
    with pytest.raises(ValueError, match="a value is 1e\\+09 times its row's weights, beyond float16"):
        ternarize._stored(gpu.to_device(grids), gpu.to_device(row))
    with pytest.raises(ValueError, match="a value is 1e\\+09 times"):
        encode(gpu.to_device(grids[which, :, 2:]), gpu.to_device(row))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_or_fits_no_row_is_refused(bad):
    row = gpu.to_device(np.ones((2, 1), np.float16))
    with pytest.raises(ValueError, match=r"W\[1, 0\] is (nan|inf)"):
        row_factor(gpu.to_device(np.array([[1.0, 2.0], [bad, 3.0]])))
    with pytest.raises(ValueError, match=r"value\[1, 0\] is (nan|inf)"):
        encode(gpu.to_device(np.array([[1.0], [bad]])), row)
    for shape in ((1, 1), (2, 2)):
        with pytest.raises(ValueError, match=r"value has shape .* expected \(2, 1\)"):
            encode(gpu.to_device(np.ones(shape)), row)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_factor_of_a_row_is_its_root_mean_square(dtype):
    W = np.array([[3.0, 4.0, 0.0, 0.0], [0.0] * 4, [-2.0] * 4], dtype)
    factor = row_factor(gpu.to_device(W))
    assert gpu.to_host(factor).tolist() == [[2.5], [0.0], [2.0]]
    assert factor.dtype == np.float16


def test_the_factor_of_float32_weights_is_rounded_once():
    # Half way between two numbers of float16, and h² / 2 of it above: nothing that float32 can tell.
    tie = 1 + 2.0**-11
    for h in 2.0 ** -np.arange(13, 16):
        weights = np.array([[tie + h, tie - h]], np.float32)
        assert sum(Fraction(float(w)) ** 2 for w in weights[0]) > 2 * Fraction(tie) ** 2
        assert row_factor(gpu.to_device(weights)) == np.float16(1 + 2.0**-10)
