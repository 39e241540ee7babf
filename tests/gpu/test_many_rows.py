"""What lies far down, where the number of a row no longer fits a byte."""

import numpy as np
import pytest

import gpu
from gpu.kernels.packing import pack_rows, unpack_rows
from gpu.kernels.similarity import compare_columns

ROWS, BYTES = 300, 3


@pytest.mark.parametrize(("digits", "base"), [(5, 3), (4, 4)])
@pytest.mark.parametrize("row", [127, 128, 255, 256, 299])
def test_damage_in_any_row_is_found(row, digits, base):
    trits = np.zeros((ROWS, BYTES * digits), np.int8)
    packed, damage = pack_rows(gpu.to_device(trits), digits, base)
    assert damage.tolist() == [packed.size, packed.size]
    bytes_ = gpu.to_host(packed).copy()
    trits[row, digits + 1] = 2
    assert pack_rows(gpu.to_device(trits), digits, base)[1].tolist()[0] == BYTES * row + 1
    bytes_[row, 1] = 255
    _, damage = unpack_rows(gpu.to_device(bytes_), BYTES * digits, digits, base)
    assert damage.tolist() == [BYTES * row + 1, packed.size]
    bytes_[row] = sum(base**place for place in range(digits - 1))  # t = 0 but for the last, t = -1
    _, damage = unpack_rows(gpu.to_device(bytes_), BYTES * digits - 1, digits, base)
    assert damage.tolist() == [packed.size, BYTES * row + 2]


def test_a_column_with_one_weight_anywhere_is_no_column_of_zeros():
    rows = [0, 127, 128, 255, 256, 299]
    W = np.zeros((ROWS, len(rows) + 1))
    W[rows, range(len(rows))] = weights = [2.0, -3.0, 5.0, -7.0, 11.0, -13.0]
    similarity = compare_columns(gpu.to_device(W), gpu.to_device(np.ones(W.shape[1], bool)))
    # The row sums are the weights, and the unit columns are their signs.
    assert similarity.tolist() == [*np.abs(weights), -np.inf]
