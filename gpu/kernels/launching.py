"""Launch the Numba kernels through CuPy.

A matrix takes thousands of launches of kernels that run for microseconds. Numba's own dispatch determines the
argument types at every launch: for seven arrays, this takes 127 µs on the host before the driver is called
(numba-cuda 0.30). Here, Numba compiles a kernel once for each combination of types, and CuPy launches it on
its current stream, like the kernels in CUDA C++. This takes 13 to 19 µs.

A Numba kernel takes an array as two pointers that it does not dereference, the number of elements, the item
size in bytes, the address, the shape, and the strides in bytes; it takes a number by value. Kernels are
compiled for arrays in C order.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numba
from numba import cuda, types

from gpu.device import STANDIN, xp
from gpu.kernels.lanes import LANES


def launch(kernel: Any, grid: int | tuple[int, ...], *arguments: Any) -> None:
    """Launch a kernel with `LANES` threads per block, asynchronously; the stand-in simulates it.

    Parameters
    ----------
    kernel : kernel of Numba
        A dispatcher that `cuda.jit` returned.
    grid : int or tuple of int
        Number of CUDA blocks in each dimension, at least 1.
    *arguments : arrays, int or bool
        Arguments of the kernel; integers have 64 bits.

    Raises
    ------
    ValueError
        If an array is not in C order.
    """
    arrays = [argument for argument in arguments if isinstance(argument, xp.ndarray)]
    if not all(array.flags.c_contiguous for array in arrays):
        raise ValueError(f"{kernel.py_func.__name__} takes arrays in C order")
    if STANDIN:
        kernel[grid, LANES](*arguments)
        return
    function = _function(kernel, tuple(map(kind, arguments)), xp.cuda.runtime.getDevice())
    flat: list[Any] = []
    for argument in arguments:
        flat += flattened(argument)
    function(grid if isinstance(grid, tuple) else (grid,), (LANES,), tuple(flat))


def flattened(argument: Any) -> tuple[Any, ...]:
    """Expand an argument into the parameters of a compiled kernel."""
    if not isinstance(argument, xp.ndarray):
        return (argument,)
    address = argument.data.ptr
    return 0, 0, argument.size, argument.itemsize, address, *argument.shape, *argument.strides


def kind(argument: Any) -> Any:
    """Describe the type of an argument, quick to compare: dtype and number of dimensions, int or bool."""
    return (argument.dtype, argument.ndim) if isinstance(argument, xp.ndarray) else type(argument)


def _type(kind: Any) -> Any:
    if isinstance(kind, tuple):
        dtype, ndim = kind
        return types.Array(numba.from_dtype(dtype), ndim, "C")
    return {int: types.int64, bool: types.boolean}[kind]


@cache
def _function(kernel: Any, kinds: tuple[Any, ...], device: int) -> Any:
    capability = xp.cuda.Device(device).compute_capability
    name, ptx = compiled(kernel, kinds, capability)
    module = xp.cuda.function.Module()
    module.load(assembled(ptx, capability))
    return module.get_function(name)


def compiled(kernel: Any, kinds: tuple[Any, ...], capability: str) -> tuple[str, str]:
    """Compile a kernel for kinds of arguments and a compute capability such as "90"; return name and PTX."""
    signature = types.void(*map(_type, kinds))
    ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=divmod(int(capability), 10))
    (name,) = re.findall(r"\.entry\s+(\w+)", ptx)
    return name, ptx


def assembled(ptx: str, capability: str) -> bytes:
    """Assemble PTX to machine code; a driver older than the compiler might not accept the PTX."""
    from cuda.core import Program, ProgramOptions

    return Program(ptx, "ptx", ProgramOptions(arch=f"sm_{capability}")).compile("cubin").code
