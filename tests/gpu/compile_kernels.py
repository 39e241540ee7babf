"""Compile every Numba kernel to machine code, which needs no device: python tests/gpu/compile_kernels.py 90.

A program of its own, since the process that runs it must not be in Numba's simulator, and device
functions keep what they were compiled for.
"""

# ruff: noqa: E402
import os
import re
import sys
from itertools import product as all_of
from types import SimpleNamespace

import numpy as np

vars(np).pop("row_stack", None)  # as in NumPy 2.5
os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # arrays of NumPy, as there is no device to import CuPy for
import gpu.device  # noqa: F401

os.environ["NUMBA_ENABLE_CUDASIM"] = "0"  # and the real compiler
from numba.cuda import dispatcher
from numba.cuda.descriptor import cuda_target

from gpu.kernels import (
    alignment,
    descent,
    feedforward,
    fitting,
    launching,
    packing,
    product,
    segments,
    similarity,
)


def array(dtype, ndim):
    return np.dtype(dtype), ndim


def signatures():
    """Kernels by name, with the kinds of the arguments they are launched with."""
    row_sums, sums = array("float64", 1), array("float64", 3)
    for dtype in ("float32", "float64"):
        W, T = array(dtype, 2), array("int8", 2)
        two = array("float64", 2)
        yield (
            f"fitting.fit_rows {dtype}",
            fitting.fit_rows_kernel,
            (W, bool, bool, bool, int, two, T, T, two, array("int32", 1)),
        )
        yield f"alignment.align_rows {dtype}", alignment.align_rows_kernel, (W, T, two, row_sums, bool, two)
        yield f"similarity.add_rows {dtype}", similarity.add_rows_kernel, (W, row_sums)
        yield f"similarity.add_squares {dtype}", similarity.add_squares_kernel, (W, sums)
        yield f"similarity.add_products {dtype}", similarity.add_products_kernel, (W, row_sums, sums)
        for grid, order in all_of(("float32", "float64"), ("uint16", "uint32")):
            yield (
                f"product.multiply {dtype} {grid} {order}",
                product.multiply_kernel,
                (W, array("uint32", 4), array(grid, 3), array(order, 1), int, two),
            )
    two, T, one = array("float64", 2), array("int8", 2), array("float64", 1)
    yield "feedforward.feed_rows", feedforward.feed_rows_kernel, (two, two, two, T)
    yield "segments.match_rows", segments.match_rows_kernel, (two, T, int, int, two)
    kinds = (T, two, two, two, one, int, int, array("int64", 1))
    yield "descent.descend_rows", descent.descend_rows_kernel, kinds
    for name, kernel, kinds in (
        ("compare", similarity.compare_kernel, (sums, array("bool", 1), row_sums)),
        ("rank", similarity.rank_kernel, (row_sums, array("int32", 1))),
        ("collect", similarity.collect_kernel, (array("int32", 1), array("int64", 1))),
    ):
        yield f"similarity.{name}", kernel, kinds
    for name, kernel, source, made in (
        ("pack_rows", packing.pack_rows_kernel, "int8", "uint8"),
        ("unpack_rows", packing.unpack_rows_kernel, "uint8", "int8"),
    ):
        kinds = (array(source, 2), array(made, 2), int, int, array("int64", 1))
        yield f"packing.{name}", kernel, kinds


def check_parameters(ptx, kinds):
    """Whether a kernel takes its arguments as `launching.flattened` gives them."""
    bits = []
    for kind in kinds:
        if isinstance(kind, tuple):
            model = cuda_target.target_context.data_model_manager.lookup(launching._type(kind))
            fields = ("meminfo", "parent", "nitems", "itemsize", "data", "shape", "strides")
            assert model._fields == fields, model._fields
            bits += [64] * (5 + 2 * kind[1])
        else:
            bits.append({int: 64, bool: 8}[kind])
    parameters = re.findall(r"\.param \.[a-z](\d+)", ptx[: ptx.index("{", ptx.index(".entry"))])
    assert [int(size) for size in parameters] == bits, (parameters, bits)


def main(capability):
    """Print one line a kernel."""
    cc = divmod(int(capability), 10)
    # Device functions ask which device they are compiled for; there is none to ask.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc)
    for name, kernel, kinds in signatures():
        entry, ptx = launching.compiled(kernel, kinds, capability)
        assert f".target sm_{capability}" in ptx, ptx[:500]
        check_parameters(ptx, kinds)
        code = launching.assembled(ptx, capability)
        assert code.startswith(b"\x7fELF"), code[:16]
        assert entry.encode() in code, entry
        print(f"{name}: {len(code)} bytes, {ptx.count('bar.sync')} barriers")


if __name__ == "__main__":
    main(sys.argv[1])
