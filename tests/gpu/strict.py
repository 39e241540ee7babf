"""A stand-in that keeps host and device apart as CuPy does: python -m tests.gpu.strict.

NumPy in CuPy's place lets arrays of both meet. Here arrays of `gpu` are of a class of their own, and
NumPy's functions and its arrays are refused on them, so that what would fail on a device fails here. It
runs the golden cases; exit code 0 if all pass.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"

import numpy as np

# TernaryMatrix.dequantize calls these, which CuPy takes over for its own arrays.
DISPATCHED = {np.broadcast_to, np.empty_like}
# CuPy accepts these of anything and brings it to the device.
BRINGING = {"asarray", "array", "ascontiguousarray"}
METHODS = ("sum", "mean", "max", "min", "any", "all", "argmax", "argmin", "argsort")
METHODS += ("reshape", "ravel", "copy", "transpose")


class DeviceArray(np.ndarray):
    """An array that meets only its like, scalars and nothing else."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        out = options.pop("out", None)
        _refuse_host(inputs, out)
        if out is not None:
            getattr(ufunc, method)(*map(_plain, inputs), out=tuple(map(_plain, out)), **options)
            return out[0]
        return _device(getattr(ufunc, method)(*map(_plain, inputs), **options))

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        if function not in DISPATCHED:
            raise TypeError(f"numpy.{function.__name__} of a device array")
        return _device(function(*map(_plain, args), **{name: _plain(v) for name, v in options.items()}))

    def __getitem__(self, index: Any) -> Any:
        _refuse_host(index)
        return _device(super().__getitem__(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        _refuse_host(index, value)
        super().__setitem__(index, value)

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def astype(self, dtype: Any, *args: Any, **options: Any) -> Any:
        """As NumPy's, and the array itself where there is nothing to convert and no copy is asked for."""
        plain = _plain(self)
        result = plain.astype(dtype, *args, **options)
        return self if result is plain else _device(result)

    def var(self, axis: Any = None, dtype: Any = None) -> Any:
        """As NumPy's, but for a type of its own, in which CuPy does not take the mean."""
        if dtype is not None and dtype != self.dtype:
            raise TypeError(f"the mean would be taken in {self.dtype}")
        return _device(_plain(self).var(axis=axis))


def _method(name: str) -> Callable[..., Any]:
    def call(self: DeviceArray, *args: Any, **options: Any) -> Any:
        out = options.pop("out", None)
        _refuse_host(args, out)
        if out is not None:
            getattr(_plain(self), name)(*args, out=_plain(out), **options)
            return out
        return _device(getattr(_plain(self), name)(*args, **options))

    return call


for _name in METHODS:
    setattr(DeviceArray, _name, _method(_name))


class DeviceModule:
    """A module of NumPy whose functions take and give device arrays."""

    ndarray = DeviceArray

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._module, name)
        if isinstance(member, type) or not callable(member):
            return DeviceModule(member) if isinstance(member, type(np)) else member

        def call(*args: Any, **options: Any) -> Any:
            if name not in BRINGING:
                _refuse_host(args, list(options.values()))
            return _device(member(*map(_plain, args), **{key: _plain(v) for key, v in options.items()}))

        return call


def _refuse_host(*values: Any) -> None:
    for value in values:
        if isinstance(value, tuple | list):
            _refuse_host(*value)
        elif isinstance(value, np.ndarray) and not isinstance(value, DeviceArray) and value.ndim:
            raise TypeError(f"a host array of shape {value.shape} meets a device array")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_plain, value))
    return value.view(np.ndarray) if isinstance(value, DeviceArray) else value


def _device(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_device, value))
    return np.asarray(value).view(DeviceArray) if isinstance(value, np.ndarray | np.generic) else value


def _around(function: Callable[..., Any], give: Callable[[Any], Any] = _device) -> Callable[..., Any]:
    """What runs below the arrays (libraries, kernels) gets NumPy's."""
    return lambda *args: give(function(*map(_plain, args)))


def install() -> None:
    """Put device arrays in the place of NumPy's, before the rest of `gpu` is imported."""
    from gpu import device

    device.xp = DeviceModule(np)
    for name in ("cholesky", "solve_lower", "solve_systems", "subtract_product"):
        setattr(device, name, _around(getattr(device, name)))
    from gpu.kernels import alignment, descent, feedforward, fitting, packing, segments, similarity

    for module in (alignment, descent, feedforward, fitting, packing, segments, similarity):
        for name in [name for name in vars(module) if name.endswith(("rows_cpu", "columns_cpu"))]:
            setattr(module, name, _around(getattr(module, name)))
    import gpu

    gpu.to_device = lambda value: _device(np.asarray(value)) if isinstance(value, np.ndarray) else value
    gpu.to_host = _plain


def pytest_load_initial_conftests() -> None:
    """As a plugin, ``pytest -p tests.gpu.strict``: for the tests of a file."""
    install()


if __name__ == "__main__":
    install()
    from harness.verify.__main__ import main

    sys.exit(main(["--backend", "gpu", *sys.argv[1:]]))
