"""A ternarized matrix on the device, read back as floats."""

import numpy as np
import pytest

import gpu
from reference.types import CodedGrid, TernaryMatrix

# The last block has fewer columns than the others.
ROWS, COLUMNS, BLOCK_SIZE = 3, 11, 4
BLOCKS = 3


def grid(rng, kind):
    """Values of blocks as they are stored, in host arrays, and the value of one row and block."""
    row, block = (rng.uniform(0.5, 2, shape).astype(np.float16) for shape in ((ROWS, 1), (1, BLOCKS)))
    codes = rng.integers(-127, 128, (ROWS, BLOCKS)).astype(np.int8)
    if kind == "int8":
        return CodedGrid(codes, row, block), lambda i, b: row[i, 0].astype("f") * block[0, b] * codes[i, b]
    values = (codes / 64 * row).astype(np.float16)
    return values, lambda i, b: values[i, b].astype("f")


def on_device(stored):
    if isinstance(stored, CodedGrid):
        return CodedGrid(*map(gpu.to_device, (stored.codes, stored.row, stored.block)))
    return gpu.to_device(stored)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_every_weight_is_that_of_its_trit_and_block(kind, permuted):
    rng = np.random.default_rng(7)
    (scale, alpha), (shift, mu) = grid(rng, kind), grid(rng, kind)
    trits = rng.integers(-1, 2, (ROWS, COLUMNS)).astype(np.int8)
    permutation = rng.permutation(COLUMNS) if permuted else np.arange(COLUMNS)
    matrix = TernaryMatrix(
        gpu.to_device(trits), on_device(scale), on_device(shift), gpu.to_device(permutation), BLOCK_SIZE
    )
    W_hat = matrix.dequantize()
    assert type(W_hat) is type(matrix.trits)
    assert W_hat.dtype == np.float32
    expected = np.empty((ROWS, COLUMNS), dtype=np.float32)
    for i in range(ROWS):
        for place, column in enumerate(permutation):
            block = place // BLOCK_SIZE
            expected[i, column] = alpha(i, block) * np.float32(trits[i, place]) + mu(i, block)
    np.testing.assert_array_equal(gpu.to_host(W_hat), expected)
