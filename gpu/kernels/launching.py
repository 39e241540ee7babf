"""Launches of the Numba kernels, by CuPy.

A matrix takes thousands of launches of kernels that run for microseconds. Numba's own dispatch determines the
types of the arguments anew at every launch: for seven arrays 127 µs of the host, before the driver is called
(numba-cuda 0.30). Here Numba compiles a kernel once for every combination of types, and CuPy launches it on
its current stream, as it launches those in CUDA C++. That takes 13 to 19 µs.

A Numba kernel takes an array as two pointers that it does not follow, the number of elements, the bytes of an
element, the address, the shape, and the strides in bytes; and a number as itself. Kernels are compiled for
arrays in C order.
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
    """Run a kernel with `LANES` threads a block, without waiting for it; the stand-in simulates it.

    Parameters
    ----------
    kernel : kernel of Numba
        A dispatcher that `cuda.jit` returned.
    grid : int or tuple of int
        Blocks, none of them 0.
    *arguments : arrays, int or bool
        What the kernel takes; integers are of 64 bits.

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
    """An argument as a compiled kernel takes it."""
    if not isinstance(argument, xp.ndarray):
        return (argument,)
    address = argument.data.ptr
    return 0, 0, argument.size, argument.itemsize, address, *argument.shape, *argument.strides


def kind(argument: Any) -> Any:
    """The type of an argument in a form that is quick to compare: dtype and dimensions, int or bool."""
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
    """A kernel for arguments of these kinds and a compute capability, as in "90": its name and PTX."""
    signature = types.void(*map(_type, kinds))
    ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=divmod(int(capability), 10))
    (name,) = re.findall(r"\.entry\s+(\w+)", ptx)
    return name, ptx


def assembled(ptx: str, capability: str) -> bytes:
    """Machine code, assembled here: the driver may be older than the compiler and not know its PTX."""
    from cuda.core import Program, ProgramOptions

    return Program(ptx, "ptx", ProgramOptions(arch=f"sm_{capability}")).compile("cubin").code
