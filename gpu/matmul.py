"""The product with a ternary matrix, straight from packed trits; see `reference.matmul`.

`matmul` has the reference's arguments and float64 results. A model calls `lay_out` once for a matrix as
it is loaded, and `multiply` for every product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu import checks
from gpu.device import STANDIN, Array, xp
from gpu.kernels import product, tensor_cores
from gpu.kernels.product import CHUNK, WORD
from gpu.packing import pack_2bit, unpack_base3


@dataclass(frozen=True)
class Packed:
    """A ternary matrix as kernels read it, made by `lay_out`.

    Attributes
    ----------
    words : (n, 16 ceil(m / 256)) uint32
        Trits in quantization order: t + 1 of trits 16w to 16w + 15 in two bits each makes word w, from
        the lowest bits up. Of the 16 words of 256 columns, a chunk, word 4r + t is stored at 4t + r: the
        four lanes of a warp that share a row load 128 bits each, and hold 64 consecutive columns in
        their r-th words, which lie in one block. A row is filled up with t = 0 to a whole chunk.
    grid : (n, blocks, 2) float16, float32 or float64
        alpha and mu of every block; only float16 has fast kernels.
    permutation : (m,) uint32
        Original column of every trit, each once.
    block_size : int
        Columns in a block; the last may have fewer. Only 64, 128, 256, 512, ... have fast kernels.

    Raises
    ------
    TypeError, ValueError
        If an array is not of this type and shape, not contiguous, or not on the device of the others.
    """

    words: Array
    grid: Array
    permutation: Array
    block_size: int

    def __post_init__(self) -> None:
        # Aligned to 128 bits, which is what kernels load at a time.
        _device_array("permutation", self.permutation, ("uint32",), 1, 16)
        _device_array("words", self.words, ("uint32",), 2, 16)
        _device_array("grid", self.grid, ("float16", "float32", "float64"), 3, 16)
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        n, m = self.shape
        checks.same_shape("words", self.words, (n, CHUNK // WORD * -(-m // CHUNK)))
        checks.same_shape("grid", self.grid, (n, -(-m // self.block_size), 2))
        for name in ("grid", "permutation"):
            _same_device(name, getattr(self, name), self.words)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        return self.words.shape[0], self.permutation.shape[0]


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
    For checks: the matrix is laid out anew at every call. `multiply` is what is fast.
    """
    x = xp.ascontiguousarray(checks.matrix(x, "x"))
    columns = xp.asarray(permutation)
    if columns.shape != (x.shape[1],):
        raise ValueError(f"permutation has shape {columns.shape}, expected {(x.shape[1],)}")
    return _in_float64(x, lay_out(packed, scale, shift, columns, block_size))


def lay_out(packed: Array, scale: Array, shift: Array, permutation: Array, block_size: int) -> Packed:
    """Rearrange a matrix of a checkpoint for the kernels, once.

    Parameters
    ----------
    packed : (n, ceil(m / 5)) array of uint8
        Trits as `gpu.packing.pack_base3` makes them.
    scale, shift : (n, ceil(m / block_size)) array
        alpha and mu of every block; kept in float16 if both are, and in float64 otherwise.
    permutation : (m,) array of int
        Original column of every trit.
    block_size : int
        Columns in a block; the last may have fewer.

    Returns
    -------
    Packed

    Raises
    ------
    ValueError
        As for `matmul`.
    """
    scale, shift, order = xp.asarray(scale), xp.asarray(shift), xp.asarray(permutation)
    m = order.size
    if order.ndim != 1 or m == 0 or not (xp.sort(order) == xp.arange(m)).all():
        raise ValueError(f"permutation must hold every index from 0 to {max(m - 1, 0)} once")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    trits = unpack_base3(packed, m)
    n, blocks = trits.shape[0], -(-m // block_size)
    grid = xp.empty((n, blocks, 2), np.float16 if scale.dtype == shift.dtype == np.float16 else np.float64)
    for i, (name, value) in enumerate((("scale", scale), ("shift", shift))):
        checks.same_shape(name, checks.matrix(value, name), (n, blocks))
        grid[:, :, i] = value
    chunks = -(-m // CHUNK)
    filled = xp.zeros((n, chunks * CHUNK), np.int8)
    filled[:, :m] = trits
    words = pack_2bit(filled).view(np.uint32).reshape(n, chunks, 4, 4).transpose(0, 1, 3, 2)
    return Packed(
        xp.ascontiguousarray(words).reshape(n, chunks * CHUNK // WORD),
        grid,
        order.astype(np.uint32),
        block_size,
    )


def multiply(x: Array, layout: Packed) -> Array:
    """``x @ W_hat.T`` in the type of x, on the current stream.

    Parameters
    ----------
    x : (tokens, m) array on the device, C-ordered
        Activations, columns in the original order: float16, float32, float64, or bfloat16 as 16-bit
        integers that hold its bits (uint16 or int16), as CuPy has no bfloat16. A torch tensor comes as
        ``to_device(x)`` or ``to_device(x.view(torch.int16))``, through DLPack, without a copy.
    layout : Packed
        What `lay_out` made.

    Returns
    -------
    y : (tokens, n) array of the type of x

    Raises
    ------
    TypeError
        If x is not an array of the device, or of another type.
    ValueError
        If its shape, order or device does not fit `layout`.

    Notes
    -----
    16-bit activations take the tensor cores of a device of compute capability 8.0 or higher, if alpha
    and mu are float16 and the block size is 64, 128, 256, ...; sums are then float32, and all else is
    computed in float64. A row of y depends on its own row of x alone, to the bit as long as the same
    kernel is chosen, which is one up to 16 tokens and another above. Infinity or NaN in a row of x
    makes its row of y infinite or NaN. Finite bfloat16 whose sum over a block leaves the range of
    float32 does the same.
    """
    _device_array("x", x, (*tensor_cores.TYPES, "float32", "float64"), 2)
    n, m = layout.shape
    checks.same_shape("x", x, (x.shape[0], m))
    _same_device("x", x, layout.words)
    if x.shape[0] == 0:
        return xp.empty((0, n), x.dtype)
    if not STANDIN and x.dtype.name in tensor_cores.TYPES and layout.grid.dtype == np.float16:
        capability, shared = tensor_cores.limits(x.device.id)
        if tensor_cores.takes(m, layout.block_size, capability, shared):
            arrays = (x, layout.words, layout.grid, layout.permutation)
            return tensor_cores.multiply(*arrays, layout.block_size, shared)
    return _narrowed(_in_float64(x, layout), x.dtype)


def _in_float64(x: Array, layout: Packed) -> Array:
    grid = layout.grid
    if grid.dtype == np.float16:  # Numba's CPU compiler does not know it
        grid = grid.astype(np.float32)
    if x.dtype == np.float16:
        x = x.astype(np.float32)
    elif x.dtype.kind in "iu":  # bfloat16 is the upper half of a float32
        x = (x.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return product.multiply(x, layout.words, grid, layout.permutation, layout.block_size)


def _narrowed(y: Array, dtype: Any) -> Array:
    with np.errstate(over="ignore"):
        if dtype.kind == "f":
            return y.astype(dtype)
        bits = y.astype(np.float32).view(np.uint32)
    # To the nearest, ties to even; a NaN whose high bits are 0 must not become infinity.
    nearest = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    upper = xp.where(xp.isnan(y), np.uint32(0x7FC00000), nearest) >> np.uint32(16)
    return upper.astype(np.uint16).view(dtype)


def _device_array(name: str, array: Any, dtypes: tuple[str, ...], ndim: int, alignment: int = 1) -> None:
    if not isinstance(array, xp.ndarray):
        raise TypeError(f"{name} must be an array of {xp.__name__}, got {type(array).__name__}")
    if array.dtype.name not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(dtypes)}, got {array.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {array.shape}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous in C order, got strides {array.strides}")
    # What other libraries hand over may start anywhere, and no kernel could say so.
    if not STANDIN and array.data.ptr % max(alignment, array.dtype.itemsize):
        raise ValueError(f"{name} must begin at a multiple of {max(alignment, array.dtype.itemsize)} bytes")


def _same_device(name: str, array: Array, words: Array) -> None:
    if array.device != words.device:
        raise ValueError(f"{name} is on device {array.device}, words are on {words.device}")
    if not STANDIN and array.device != xp.cuda.Device():
        raise ValueError(f"{name} is on device {array.device}, the current one is {xp.cuda.Device()}")
