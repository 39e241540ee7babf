"""The product with a ternary matrix, straight from packed trits; see `reference.matmul`.

`matmul` has the reference's arguments and float64 results, for checks. A model calls `gpu.layout.lay_out`
once when it loads a matrix, and `multiply` for every product. `gpu.kernels.choice` chooses the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gpu import checks
from gpu.device import STANDIN, Array, xp
from gpu.kernels import dense, product
from gpu.kernels.choice import Kernel, choose
from gpu.kernels.layout import Layout, device_array, same_device
from gpu.kernels.parameters import TYPES
from gpu.kernels.sources import NO_DEVICE, Limits, limits
from gpu.layout import lay_out
from gpu.twin import twin


@twin
def matmul(x: Array, packed: Array, scale: Array, shift: Array, permutation: Array, block_size: int) -> Array:
    """Every call lays the matrix out anew, for checks. Call `lay_out` once and `multiply` for speed."""
    x = xp.ascontiguousarray(checks.matrix(x, "x"))
    columns = xp.asarray(permutation)
    if columns.shape != (x.shape[1],):
        raise ValueError(f"permutation has shape {columns.shape}, expected {(x.shape[1],)}")
    return _in_float64(x, lay_out(packed, scale, shift, columns, block_size))


def multiply(x: Array, layout: Layout, y: Array | None = None) -> Array:
    """``x @ W_hat.T`` in the type of x, on the current stream.

    Parameters
    ----------
    x : (tokens, m) array on the device, C-ordered
        Activations, columns in the original order: float16, float32, float64, or the bits of bfloat16 as
        uint16 or int16, because CuPy has no bfloat16. ``to_device(x)`` and ``to_device(x.view(torch.int16))``
        take a torch tensor through DLPack, without a copy.
    layout : Layout
        From `gpu.layout.lay_out` or `gpu.layout.join`.
    y : (tokens, n) array of the type of x, optional
        Is overwritten with the product; a new array if left out.

    Returns
    -------
    y : (tokens, n) array of the type of x
        The products with the parts of a joined layout side by side.

    Raises
    ------
    TypeError
        If x or y is not an array of the device, or of another type.
    ValueError
        If a shape, order or device does not fit `layout`.

    Notes
    -----
    16-bit activations use the tensor cores of a device of compute capability 8.0 or higher, if alpha and mu
    are float16 or codes, the block size is 64, 128, 256, ..., and a row of x fits into the shared memory of a
    CUDA block. Sums are float32 then, and float64 otherwise. A row of y depends only on its own row of x, to
    the bit as long as the same kernel is chosen: one kernel serves up to 16 tokens, another more. On Hopper
    the latter rounds weights to the type of x, if that type holds them all.

    Infinity or NaN in a row of x makes its row of y infinite or NaN. So does finite bfloat16 whose sum over a
    block leaves the range of float32. CuPy compiles with flushing: float32 sums and factors below 2⁻¹²⁶
    count as 0, which only bfloat16 and subnormal scales come near.
    """
    _check_activations(x, layout)
    n = layout.ends[-1]
    if y is None:
        y = xp.empty((x.shape[0], n), x.dtype)
    device_array("y", y, (x.dtype.name,), 2)
    checks.same_shape("y", y, (x.shape[0], n))
    same_device("y", y, layout.words)
    if x.shape[0] == 0:
        return y
    chosen = _kernel(x, layout, library=False)
    if chosen.multiply is None:
        y[:] = _narrowed(_in_float64(x, layout), x.dtype)
    else:
        chosen.multiply(x, layout, _limits(x), y)
    return y


def prefers_unpacked(x: Array, layout: Layout) -> bool:
    """Whether a caller with a library's product should take it, with the weights of `unpacked`."""
    return _kernel(x, layout, library=True).library


def unpacked(x: Array, layout: Layout) -> Iterator[Array]:
    """Dense weights for a library's product, one part at a time.

    Parameters
    ----------
    x : (tokens, m) array
        As for `multiply`; `prefers_unpacked` must hold.
    layout : Layout
        What `gpu.layout` made.

    Yields
    ------
    B : (rows, m) array of the type of x
        For every part, dense weights in the type of x: ``x @ B.T`` are the part's columns of the product.

    Raises
    ------
    TypeError, ValueError
        As for `multiply`.
    """
    _check_activations(x, layout)
    for part in range(len(layout.ends)):
        yield dense.unpack(layout, part, x.dtype, _limits(x))


def _kernel(x: Array, layout: Layout, library: bool) -> Kernel:
    return choose(x.shape[0], x.dtype, layout, _limits(x), library)


def _limits(x: Array) -> Limits:
    return NO_DEVICE if STANDIN else limits(x.device.id)


def _check_activations(x: Array, layout: Layout) -> None:
    device_array("x", x, (*TYPES, "float32", "float64"), 2)
    checks.same_shape("x", x, (x.shape[0], layout.columns))
    same_device("x", x, layout.words)


def _in_float64(x: Array, layout: Layout) -> Array:
    if x.dtype == np.float16:
        x = x.astype(np.float32)
    elif x.dtype.kind in "iu":  # bfloat16 is the upper half of a float32
        x = (x.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return product.multiply(x, layout)


def _narrowed(y: Array, dtype: Any) -> Array:
    with np.errstate(over="ignore"):
        if dtype.kind == "f":
            return y.astype(dtype)
        bits = y.astype(np.float32).view(np.uint32)
    # Rounds to the nearest, ties to even; a NaN whose high bits are 0 must not become infinity.
    nearest = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    upper = xp.where(xp.isnan(y), np.uint32(0x7FC00000), nearest) >> np.uint32(16)
    return upper.astype(np.uint16).view(dtype)
