"""In the stand-in, kernels run in Numba's simulator if asked to, and as compiled for the CPU otherwise."""

import numpy as np
import pytest

from gpu.device import STANDIN
from gpu.kernels import alignment, fitting, packing, similarity

W = np.ones((2, 5))
T = np.ones((2, 5), np.int8)
BYTES = np.full((2, 1), 121, np.uint8)
LAUNCHES = {
    "fit_rows": (fitting, ["fit_rows_kernel"], (W, 1)),
    "align_rows": (alignment, ["align_rows_kernel"], (W, T, W, W[0])),
    "pack_rows": (packing, ["pack_rows_kernel"], (T, 5, 3)),
    "unpack_rows": (packing, ["unpack_rows_kernel"], (BYTES, 5, 5, 3)),
    "compare_columns": (
        similarity,
        ["add_rows_kernel", "add_squares_kernel", "add_products_kernel", "compare_kernel"],
        (W, np.ones(5, bool)),
    ),
    "choose_columns": (similarity, ["rank_kernel", "collect_kernel"], (W[0], 2)),
}


class Launched(list):
    """Stands for a kernel: notes its name where it would be launched."""

    def kernel(self, name):
        notes = self

        class Kernel:
            def __getitem__(self, grid):
                return lambda *arguments: notes.append(name)

        return Kernel()


@pytest.mark.skipif(not STANDIN, reason="on a device kernels are always launched")
@pytest.mark.parametrize("function", LAUNCHES)
def test_kernels_are_launched_if_asked_for(monkeypatch, function):
    module, kernels, arguments = LAUNCHES[function]
    launched = Launched()
    for name in kernels:
        monkeypatch.setattr(module, name, launched.kernel(name))
    getattr(module, function)(*arguments)
    assert launched == []
    getattr(module, function)(*arguments, simulate=True)
    assert launched == kernels
