"""How Numba's kernels are launched; that compiled ones take such arguments is in compile_kernels.py."""

from types import SimpleNamespace

import numpy as np
import pytest
from numba import types

import gpu
from gpu.device import xp
from gpu.kernels import launching
from gpu.kernels.lanes import LANES
from gpu.kernels.packing import pack_rows_kernel
from gpu.kernels.similarity import add_rows_kernel


def test_arrays_that_are_not_in_c_order_are_refused():
    W, sums = gpu.to_device(np.ones((4, 6))), gpu.to_device(np.zeros(4))
    launching.launch(add_rows_kernel, 4, W, sums)
    assert gpu.to_host(sums).tolist() == [6.0] * 4
    for other in (W.T, W[:, ::2]):
        with pytest.raises(ValueError, match="add_rows_kernel takes arrays in C order"):
            launching.launch(add_rows_kernel, 4, other, sums)


def test_a_grid_may_have_two_dimensions():
    trits = gpu.to_device(np.array([[1, 0, -1, 1], [0, 0, 0, -1]], np.int8))
    packed, damage = xp.zeros((2, 1), np.uint8), xp.full(2, 2, np.int64)
    launching.launch(pack_rows_kernel, (2, 1), trits, packed, 4, 4, damage)
    digits = [(2, 1, 0, 2), (1, 1, 1, 0)]
    assert gpu.to_host(packed)[:, 0].tolist() == [sum(d * 4**i for i, d in enumerate(row)) for row in digits]


class DeviceArray:
    """An array of CuPy as far as a launch looks at it."""

    def __init__(self, array, address):
        self.dtype, self.ndim, self.shape = array.dtype, array.ndim, array.shape
        self.size, self.itemsize, self.strides = array.size, array.itemsize, array.strides
        self.flags, self.data = SimpleNamespace(c_contiguous=True), SimpleNamespace(ptr=address)


@pytest.mark.parametrize(("grid", "blocks"), [(7, (7,)), ((7, 2), (7, 2))])
def test_what_a_kernel_gets_on_a_device(grid, blocks, monkeypatch):
    launched = []

    def function(kernel, kinds, device):
        return lambda *call: launched.append((kernel, kinds, device, *call))

    cuda = SimpleNamespace(runtime=SimpleNamespace(getDevice=lambda: 3))
    monkeypatch.setattr(launching, "STANDIN", False)
    monkeypatch.setattr(launching, "xp", SimpleNamespace(ndarray=DeviceArray, cuda=cuda))
    monkeypatch.setattr(launching, "_function", function)
    matrix = DeviceArray(np.zeros((5, 3), np.float32), 4096)
    vector = DeviceArray(np.zeros(2, bool), 8192)
    launching.launch("kernel", grid, matrix, True, 9, vector)
    kinds = ((np.dtype("float32"), 2), bool, int, (np.dtype(bool), 1))
    arguments = (0, 0, 15, 4, 4096, 5, 3, 12, 4, True, 9, 0, 0, 2, 1, 8192, 2, 1)
    assert launched == [("kernel", kinds, 3, blocks, (LANES,), arguments)]
    assert [type(argument) for argument in arguments] == [type(given) for given in launched[0][-1]]


def test_what_kernels_are_compiled_for():
    assert launching._type((np.dtype(np.uint16), 3)) == types.Array(types.uint16, 3, "C")
    assert launching._type((np.dtype(bool), 1)) == types.Array(types.boolean, 1, "C")
    assert (launching._type(int), launching._type(bool)) == (types.int64, types.boolean)
