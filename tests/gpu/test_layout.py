"""The layout of the device and that of torch against the reference's, and what a layout says of itself."""

from dataclasses import replace

import numpy as np
import pytest

import gpu
import gpu.layout
import reference.layout
from gpu.device import xp
from gpu.kernels.layout import order_type
from harness.ternary.kernels.tensors import of_layout
from reference.packing import pack_base3
from tests.gpu.ternary_cases import coded_case, lay_out, random_case

ROWS = (70, 1, 33)


@pytest.mark.parametrize(
    ("make", "block_size"),
    [(random_case, 64), (random_case, 96), (random_case, 128), (random_case, 512), (coded_case, 128)],
)
def test_the_plain_grid_of_a_part_is_that_of_its_matrix(make, block_size):
    cases = [make(rows, 700, block_size) for rows in ROWS]
    layout = lay_out(*cases)
    for part, (rows, case) in enumerate(zip(ROWS, cases, strict=True)):
        grid = gpu.to_host(layout.plain_grid(part))
        assert grid.shape == (-(-rows // 32) * 32, -(-700 // block_size), 2)
        # A float32 product of a code and two float16 factors.
        np.testing.assert_allclose(grid[:rows], np.stack(case.grid, axis=-1), rtol=2**-23, atol=0)
        assert not grid[rows:].any()


def test_tiles_are_those_of_all_parts():
    layout = lay_out(*(random_case(rows, 700, 128) for rows in ROWS))
    assert layout.tiles_of_parts() == [(0, 3), (3, 4), (4, 6)]
    assert layout.tiles == 6


def test_indices_of_columns_are_as_narrow_as_they_may_be():
    assert order_type(1 << 16) == np.uint16  # the last column is 65535
    assert order_type((1 << 16) + 1) == np.uint32


@pytest.mark.parametrize("name", ["row_factors", "block_factors"])
def test_factors_of_another_type_are_refused(name):
    layout = lay_out(coded_case(9, 200, 128))
    wide = getattr(layout, name).astype(xp.float32)
    with pytest.raises(TypeError, match=f"{name} must be float16, got float32"):
        replace(layout, **{name: wide})


@pytest.mark.parametrize("order", [np.arange(200)[None], np.arange(200)[:, None]])
def test_an_order_of_two_dimensions_is_refused(order):
    case = random_case(9, 200, 128)
    arrays = map(gpu.to_device, (pack_base3(case.trits), case.scale, case.shift, order))
    with pytest.raises(ValueError, match="permutation"):
        gpu.layout.lay_out(*arrays, 128)


def reference_layout(*cases):
    layouts = [
        reference.layout.lay_out(pack_base3(c.trits), c.scale, c.shift, c.permutation, c.block_size)
        for c in cases
    ]
    return layouts[0] if len(layouts) == 1 else reference.layout.join(layouts)


def wide_case(rows, columns, block_size):
    """One whose mu are float32."""
    case = random_case(rows, columns, block_size)
    case.shift = case.shift.astype(np.float32)
    return case


def wider_case(rows, columns, block_size):
    """One whose alpha are float64."""
    case = wide_case(rows, columns, block_size)
    case.scale = case.scale.astype(np.float64)
    return case


def half_coded_case(rows, columns, block_size):
    """One whose alpha are codes, but not its mu."""
    case = coded_case(rows, columns, block_size)
    case.shift = random_case(rows, columns, block_size).shift
    return case


def other_half_coded_case(rows, columns, block_size):
    """One whose mu are codes, but not its alpha."""
    case = half_coded_case(rows, columns, block_size)
    case.scale, case.shift = case.shift, case.scale
    return case


MAKERS = [random_case, coded_case, wide_case, wider_case, half_coded_case, other_half_coded_case]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("block_size", [1, 64, 96, 128, 256, 512, 1024])
@pytest.mark.parametrize("many_rows", [(1,), (32, 5, 70)], ids=str)
@pytest.mark.parametrize("columns", [1, 300, 1100])
def test_every_bit_is_that_of_the_reference(make, block_size, many_rows, columns):
    cases = [make(rows, columns, block_size) for rows in many_rows]
    expected, got = reference_layout(*cases), lay_out(*cases)
    for name, value in vars(expected).items():
        ours = gpu.to_host(getattr(got, name))
        if isinstance(value, np.ndarray):
            assert ours.dtype == value.dtype
            assert ours.shape == value.shape
            assert ours.tobytes() == value.tobytes(), name
        else:
            assert ours == value, name
    assert got.tiles_of_parts() == expected.tiles_of_parts()
    assert got.shape == expected.shape


@pytest.mark.parametrize(
    ("alpha", "mu", "fits"),
    [
        (65504, 0, True),
        (0, -65504, True),
        (-60000, 5504, True),
        (-60000, 5536, False),
        (60000, -5536, False),
        (5536, 60000, False),
        (65504, 2**-24, False),
    ],
)
def test_weights_beyond_float16_are_known(alpha, mu, fits):
    case = random_case(3, 70, 64)
    case.scale[1, 0], case.shift[1, 0] = alpha, mu
    assert lay_out(case).in_float16 is fits
    small = random_case(3, 70, 64)
    assert lay_out(case, small).in_float16 is lay_out(small, case).in_float16 is fits


@pytest.mark.parametrize("columns", [2**16, 2**16 + 1])
def test_the_order_of_many_columns_is_that_of_the_reference(columns):
    case = random_case(1, columns, 1024)
    ours, theirs = gpu.to_host(lay_out(case).permutation), reference_layout(case).permutation
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": np.ones((1, 1), np.float16)}, "scale.row has shape"),
        ({"row": np.ones((3, 1), np.float32)}, "scale.row must be float16"),
        ({"block": np.ones((1, 1), np.float16)}, "scale.block has shape"),
        ({"block": np.ones((1, 2), np.float32)}, "scale.block must be float16"),
        ({"codes": np.ones((3, 2), np.int16)}, "grid must be float16 or int8, got int16"),
    ],
)
def test_codes_that_do_not_fit_are_refused(change, message):
    case = coded_case(3, 70, 64)
    case.scale = replace(case.scale, **change)
    with pytest.raises(ValueError, match=message):
        lay_out(case)


def test_factors_of_one_row_that_are_not_shared_are_refused():
    case = coded_case(3, 70, 64)
    case.scale = replace(case.scale, row=case.scale.row * np.array([[1], [2], [1]], np.float16))
    with pytest.raises(ValueError, match="the same factors of rows"):
        lay_out(case)


@pytest.mark.parametrize("trits", [np.full((2, 3), 0.5), np.full((2, 3), 257), np.zeros(3), np.zeros((0, 3))])
def test_what_is_no_matrix_of_trits_is_refused(trits):
    with pytest.raises(ValueError, match="trits must be"):
        gpu.layout.lay_words(gpu.to_device(trits))


@pytest.mark.parametrize(
    ("columns", "block_size", "kind"),
    [(192, 64, "float32"), (288, 96, "int8"), (96, 32, "int8"), (193, 64, "int8"), (128, 64, "int8")],
)
def test_a_grid_that_does_not_fit_is_refused(columns, block_size, kind):
    with pytest.raises(ValueError, match=r"grid (must be|has shape)|block_size must be"):
        gpu.layout.lay_grid(xp.zeros((2, 3, 2), kind), columns, block_size)


@pytest.mark.parametrize("make", [random_case, coded_case])
@pytest.mark.parametrize("block_size", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("columns", [1, 300, 1100])
def test_torch_reads_the_parts_back_that_the_reference_does(make, block_size, columns):
    cases = [make(rows, columns, block_size) for rows in (33, 1, 64)]
    whole = reference_layout(*cases)
    packed = of_layout(whole)
    for index in range(len(cases)):
        theirs, ours = whole.part(index), packed.part(index)
        np.testing.assert_array_equal(ours.trits, theirs.trits)
        np.testing.assert_array_equal(ours.permutation, theirs.permutation)
        for name, other in (("scale", theirs.scale), ("shift", theirs.shift)):
            numbers = getattr(ours, name).numpy()
            assert numbers.tobytes() == getattr(other, "codes", other).tobytes()
            if make is coded_case:
                np.testing.assert_array_equal(ours.row_factor, other.row[:, 0])
                np.testing.assert_array_equal(getattr(ours, f"{name}_factor"), other.block[0])


@pytest.mark.parametrize("columns", [2**15 + 300, 2**16 + 300])
def test_torch_reads_the_order_of_many_columns_back(columns):
    whole = reference_layout(random_case(1, columns, 1024))
    ours = of_layout(whole).part(0)
    np.testing.assert_array_equal(ours.permutation, whole.part(0).permutation)
