"""What a layout says of its matrices, beside the products that are made of it."""

from dataclasses import replace

import numpy as np
import pytest

import gpu
import gpu.layout
from gpu.device import xp
from gpu.kernels.layout import order_type
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
