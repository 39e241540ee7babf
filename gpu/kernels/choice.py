"""Which kernel multiplies: one table, by device, type of x, layout and number of tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpu.kernels import decode, dense, prefill, warpgroup
from gpu.kernels.layout import Layout
from gpu.kernels.parameters import TYPES
from gpu.kernels.sources import Limits

# The first compute capability with tensor cores for bfloat16 and with asynchronous copies.
TENSOR_CORES = 80

# From so many tokens on, weights are unpacked for a library's product, which may add up a row in an order
# that depends on how many there are. Reasoned, not measured: on an H100 writing the weights takes the time of
# the library's product with about 190 tokens, and the packed kernel, which unpacks trits in the time that
# tensor cores leave, reaches some 3/4 of the library's rate.
UNPACKED_TOKENS = 512


class Kernel(NamedTuple):
    """A row of the table.

    Attributes
    ----------
    name : str
        Of the kernel's file.
    least, most : int
        Numbers of tokens it serves.
    takes : callable
        Whether it takes a type of x and a layout on a device.
    library : bool
        Whether it only makes weights for a library's product.
    multiply : callable, optional
        Its launcher, ``multiply(x, layout, device, y)``. None where there is no launcher: `dense` makes
        weights for a library's product, and `product` works in float64, which needs conversions.
    """

    name: str
    least: int
    most: int
    takes: Callable[[Any, Layout, Limits], bool]
    library: bool = False
    multiply: Callable[..., None] | None = None


def _fast(dtype: Any, layout: Layout, device: Limits) -> bool:
    """Whether kernels in CUDA C++ serve: tensor cores, a tiled layout, and a row of x in shared memory."""
    fits = 2 * layout.columns <= device.shared and layout.permutation.dtype == np.uint16
    return dtype.name in TYPES and layout.tiled and device.capability >= TENSOR_CORES and fits


def _holds_weights(dtype: Any, layout: Layout) -> bool:
    """Whether all weights are finite in the type of x; bfloat16 has room for any alpha and mu."""
    return layout.in_float16 or TYPES[dtype.name] != "float16"


def _dense(dtype: Any, layout: Layout, device: Limits) -> bool:
    fits = dense.row_pairs_at_once(layout.columns, device.shared) > 0
    return _fast(dtype, layout, device) and _holds_weights(dtype, layout) and fits


def _warpgroup(dtype: Any, layout: Layout, device: Limits) -> bool:
    fits = device.capability == warpgroup.HOPPER and warpgroup.SHARED <= device.shared
    return _fast(dtype, layout, device) and _holds_weights(dtype, layout) and fits


# The first row that serves is taken.
TABLE = (
    Kernel("dense", UNPACKED_TOKENS, sys.maxsize, _dense, library=True),
    Kernel("decode", 1, decode.MOST_TOKENS, _fast, multiply=decode.multiply),
    Kernel("warpgroup", decode.MOST_TOKENS + 1, sys.maxsize, _warpgroup, multiply=warpgroup.multiply),
    Kernel("prefill", decode.MOST_TOKENS + 1, sys.maxsize, _fast, multiply=prefill.multiply),
    Kernel("product", 0, sys.maxsize, lambda dtype, layout, device: True),
)


def choose(tokens: int, dtype: Any, layout: Layout, device: Limits, library: bool = False) -> Kernel:
    """The kernel for a product.

    Parameters
    ----------
    tokens : int
        Rows of x.
    dtype : dtype
        Of x; integers of 16 bits stand for bfloat16.
    layout : Layout
        The matrix, or the matrices.
    device : Limits
        Where it runs; `gpu.kernels.sources.NO_DEVICE` for the stand-in.
    library : bool
        Whether the caller has a library's product of dense matrices, for rows of that kind.

    Returns
    -------
    Kernel
        The first of `TABLE` that serves; `dense` only for a caller with a library's product.
    """
    return next(
        kernel
        for kernel in TABLE
        if kernel.least <= tokens <= kernel.most
        and (library or not kernel.library)
        and kernel.takes(dtype, layout, device)
    )
