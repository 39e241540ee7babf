"""The product with a ternary matrix, straight from packed trits; see `reference.matmul`.

`matmul` has the reference's arguments and float64 results, for checks. A model calls `lay_out` once when it
loads a matrix, and `multiply` for every product. `gpu.kernels.choice` chooses the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gpu import checks
from gpu.device import STANDIN, Array, xp
from gpu.kernels import dense, product
from gpu.kernels.choice import Kernel, choose
from gpu.kernels.layout import (
    Layout,
    can_be_tiled,
    device_array,
    fill_rows,
    lay_grid,
    lay_words,
    order_type,
    same_device,
    spread,
)
from gpu.kernels.parameters import TYPES
from gpu.kernels.sources import NO_DEVICE, Limits, limits
from gpu.packing import unpack_base3
from reference.layout import CHUNK, PARTS
from reference.types import CodedGrid


def matmul(x: Array, packed: Array, scale: Array, shift: Array, permutation: Array, block_size: int) -> Array:
    """``x @ W_hat.T`` without forming W_hat.

    Parameters
    ----------
    x : (tokens, m) array
        Activations, columns in the original order.
    packed : (n, ceil(m / 5)) array of uint8
        Trits as `gpu.packing.pack_base3` makes them.
    scale, shift : (n, ceil(m / block_size)) array
        alpha and mu of every block.
    permutation : (m,) array of int
        Original column of every trit.
    block_size : int
        Columns in a block; the last may have fewer.

    Returns
    -------
    y : (tokens, n) float64

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, a byte is not the code of trits, `permutation`
        does not hold every column once, or block_size is not positive.

    Notes
    -----
    For checks: the matrix is laid out anew at every call. `multiply` is the fast one.
    """
    x = xp.ascontiguousarray(checks.matrix(x, "x"))
    columns = xp.asarray(permutation)
    if columns.shape != (x.shape[1],):
        raise ValueError(f"permutation has shape {columns.shape}, expected {(x.shape[1],)}")
    return _in_float64(x, lay_out(packed, scale, shift, columns, block_size))


def lay_out(
    packed: Array, scale: Array | CodedGrid, shift: Array | CodedGrid, permutation: Array, block_size: int
) -> Layout:
    """Rearrange a matrix of a checkpoint for the kernels, once.

    Parameters
    ----------
    packed : (n, ceil(m / 5)) array of uint8
        Trits as `gpu.packing.pack_base3` makes them.
    scale, shift : (n, ceil(m / block_size)) array, or CodedGrid
        alpha and mu of every block. The kernels in CUDA C++ read float16 and codes.
    permutation : (m,) array of int
        Original column of every trit.
    block_size : int
        Columns in a block; the last may have fewer. The kernels in CUDA C++ take 64, 128, 256, 512, ...

    Returns
    -------
    Layout

    Raises
    ------
    ValueError
        As for `matmul`.
    """
    order = xp.asarray(permutation)
    m = order.size
    if order.ndim != 1 or m == 0 or not (xp.sort(order) == xp.arange(m)).all():
        raise ValueError(f"permutation must hold every index from 0 to {max(m - 1, 0)} once")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    trits = unpack_base3(packed, m)
    n = trits.shape[0]
    columns = xp.zeros((1, -(-m // CHUNK) * CHUNK), order_type(m))
    columns[0, :m] = order
    grids = _lay_grid(scale, shift, n, m, block_size)
    return Layout(lay_words(trits), permutation=columns, ends=(n,), columns=m, block_size=block_size, **grids)


def join(layouts: Sequence[Layout]) -> Layout:
    """Join matrices that multiply the same x into one layout, so that one launch serves them.

    Parameters
    ----------
    layouts : sequence of Layout
        At most three parts in all, of the same columns, block size, and type of grid.

    Returns
    -------
    Layout
        Its product is the products of the single layouts side by side.

    Raises
    ------
    ValueError
        If the layouts do not fit together.
    """
    kinds = {(a.columns, a.block_size, a.grid.dtype.name) for a in layouts}
    if len(kinds) != 1 or sum(len(a.ends) for a in layouts) > PARTS:
        raise ValueError(
            f"1 to {PARTS} matrices with the same columns, block size and type of grid can be joined, "
            f"got {sum(len(a.ends) for a in layouts)} with {sorted(kinds)}"
        )
    ends: list[int] = []
    for layout in layouts:
        begin = ends[-1] if ends else 0
        ends += [begin + end for end in layout.ends]
    names = ["words", "grid", "permutation"]
    if layouts[0].row_factors is not None:
        names += ["row_factors", "block_factors"]
    joined: dict[str, Any] = {
        name: xp.concatenate([getattr(layout, name) for layout in layouts]) for name in names
    }
    in_float16 = all(layout.in_float16 for layout in layouts)
    return replace(layouts[0], ends=tuple(ends), in_float16=in_float16, **joined)


def multiply(x: Array, layout: Layout, y: Array | None = None) -> Array:
    """``x @ W_hat.T`` in the type of x, on the current stream.

    Parameters
    ----------
    x : (tokens, m) array on the device, C-ordered
        Activations, columns in the original order: float16, float32, float64, or the bits of bfloat16 as
        uint16 or int16, because CuPy has no bfloat16. ``to_device(x)`` and ``to_device(x.view(torch.int16))``
        take a torch tensor through DLPack, without a copy.
    layout : Layout
        From `lay_out` or `join`.
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
    return _kernel(x, layout, library=True).name == "dense"


def unpacked(x: Array, layout: Layout) -> Iterator[Array]:
    """Dense weights for a library's product, one part at a time.

    Parameters
    ----------
    x : (tokens, m) array
        As for `multiply`; `prefers_unpacked` must hold.
    layout : Layout
        What `lay_out` or `join` made.

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


def _lay_grid(
    scale: Array | CodedGrid, shift: Array | CodedGrid, n: int, m: int, block_size: int
) -> dict[str, Any]:
    """The fields of `Layout` that hold alpha and mu."""
    chunks = -(-m // CHUNK)
    values = [grid.decode() if isinstance(grid, CodedGrid) else xp.asarray(grid) for grid in (scale, shift)]
    for name, value in zip(("scale", "shift"), values, strict=True):
        checks.same_shape(name, checks.matrix(value, name), (n, -(-m // block_size)))
    # alpha t + mu is this at the most, in magnitude.
    largest = abs(values[0].astype(np.float64)) + abs(values[1].astype(np.float64))
    in_float16 = bool(largest.max() <= np.finfo(np.float16).max)
    if isinstance(scale, CodedGrid) and isinstance(shift, CodedGrid) and can_be_tiled(block_size):
        codes = xp.stack([scale.codes, shift.codes], axis=-1)
        factors = xp.stack([scale.block, shift.block], axis=-1)
        return {
            "grid": lay_grid(codes, chunks, block_size),
            "row_factors": fill_rows(scale.row[:, 0]),
            "block_factors": spread(factors, chunks, block_size),
            "in_float16": in_float16,
        }
    kinds = {value.dtype.name for value in values}
    if kinds == {"float16"} and can_be_tiled(block_size):
        return {"grid": lay_grid(xp.stack(values, axis=-1), chunks, block_size), "in_float16": in_float16}
    # Numba's CPU compiler does not know float16.
    wide = np.float32 if kinds <= {"float16", "float32"} else np.float64
    return {"grid": fill_rows(xp.stack([value.astype(wide) for value in values], axis=-1))}


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
