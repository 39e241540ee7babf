"""Compile every Numba kernel to PTX, which needs no device: python tests/gpu/compile_kernels.py 90.

A program of its own, since the process that runs it must not be in Numba's simulator, and device
functions keep what they were compiled for.
"""

# ruff: noqa: E402
import os
import sys
from itertools import product as all_of
from types import SimpleNamespace

import numpy as np

vars(np).pop("row_stack", None)  # as in NumPy 2.5
os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # arrays of NumPy, as there is no device to import CuPy for
import gpu.device  # noqa: F401

os.environ["NUMBA_ENABLE_CUDASIM"] = "0"  # and the real compiler
from numba import cuda, types
from numba.cuda import dispatcher

from gpu.kernels import alignment, fitting, packing, product, similarity


def signatures():
    """Kernels by name, with the argument types they are launched with."""

    def array(dtype, ndim):
        return types.Array(dtype, ndim, "C")

    for dtype in (types.float32, types.float64):
        yield (
            f"fitting.fit_rows {dtype}",
            fitting.fit_rows_kernel,
            types.void(
                array(dtype, 2),
                types.boolean,
                types.boolean,
                types.int64,
                array(types.float64, 2),
                array(types.int8, 2),
                array(types.int8, 2),
                array(types.float64, 2),
                array(types.int32, 1),
            ),
        )
        yield (
            f"alignment.align_rows {dtype}",
            alignment.align_rows_kernel,
            types.void(
                array(dtype, 2),
                array(types.int8, 2),
                array(types.float64, 2),
                array(types.float64, 1),
                array(types.float64, 2),
            ),
        )
        row_sums, sums = array(types.float64, 1), array(types.float64, 3)
        yield (
            f"similarity.add_rows {dtype}",
            similarity.add_rows_kernel,
            types.void(array(dtype, 2), row_sums),
        )
        yield (
            f"similarity.add_squares {dtype}",
            similarity.add_squares_kernel,
            types.void(array(dtype, 2), sums),
        )
        yield (
            f"similarity.add_products {dtype}",
            similarity.add_products_kernel,
            types.void(array(dtype, 2), row_sums, sums),
        )
        for grid, order in all_of((types.float32, types.float64), (types.uint16, types.uint32)):
            yield (
                f"product.multiply {dtype} {grid} {order}",
                product.multiply_kernel,
                types.void(
                    array(dtype, 2),
                    array(types.uint32, 4),
                    array(grid, 3),
                    array(order, 1),
                    types.int64,
                    array(types.float64, 2),
                ),
            )
    for name, kernel, signature in (
        ("compare", similarity.compare_kernel, (sums, array(types.boolean, 1), row_sums)),
        ("rank", similarity.rank_kernel, (row_sums, array(types.int32, 1))),
        ("collect", similarity.collect_kernel, (array(types.int32, 1), array(types.int64, 1))),
    ):
        yield f"similarity.{name}", kernel, types.void(*signature)
    for name, kernel, source, made in (
        ("pack_rows", packing.pack_rows_kernel, types.int8, types.uint8),
        ("unpack_rows", packing.unpack_rows_kernel, types.uint8, types.int8),
    ):
        yield (
            f"packing.{name}",
            kernel,
            types.void(array(source, 2), array(made, 2), types.int64, types.int64, array(types.int64, 1)),
        )


def main(capability):
    """Print one line a kernel."""
    cc = divmod(capability, 10)
    # Device functions ask which device they are compiled for; there is none to ask.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc)
    for name, kernel, signature in signatures():
        ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=cc)
        assert f".target sm_{capability}" in ptx, ptx[:500]
        print(f"{name}: {len(ptx)} bytes, {ptx.count('bar.sync')} barriers")


if __name__ == "__main__":
    main(int(sys.argv[1]))
