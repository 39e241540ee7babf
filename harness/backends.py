"""Load a backend by its package name, and look up the operations it offers (``module.function``)."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

import reference
from harness.errors import UserError
from reference.layout import Layout
from reference.types import CodedGrid, TernaryConfig, TernaryMatrix

CPU = "cpu"  # the backend in `harness.cpu`


class MissingOperation(LookupError):
    """Raised if a backend lacks an operation of the reference."""


@dataclass(frozen=True)
class Backend:
    """A package with the same modules and functions as `reference`.

    Attributes
    ----------
    name : str
        Name of the package.
    package : module
        May define ``REFUSED``, the operations it leaves out on purpose, ``REST``, the package that computes
        what it does not offer, and ``PRECISIONS``, if it supports more than float64. If its arrays are not
        NumPy arrays, it defines ``STANDIN = False`` and the functions ``to_device``, ``to_host``,
        ``on_stream`` and ``use_allocator`` of `gpu.device`. If it cannot run on this machine,
        importing it raises a RuntimeError with the reason.
    precision : str
        dtype of the weights passed to it.
    note : str
        For the name ``auto``: which backend was chosen, and why.
    """

    name: str
    package: ModuleType
    precision: str = "float64"
    note: str = ""

    @property
    def refused(self) -> frozenset[str]:
        """Operations that the backend leaves out on purpose."""
        return frozenset(getattr(self.package, "REFUSED", ()))

    @cached_property
    def operations(self) -> dict[str, Callable[..., Any]]:
        """The package's functions by operation, ``module.function``.

        Operations are the public functions of `reference`. A package offers those that it has under the same
        names, whether it defines or imports them, and those of its ``REST``.
        """
        offered = {}
        packages = [self.package.__name__, getattr(self.package, "REST", None)]
        for entry in pkgutil.iter_modules(reference.__path__):
            paths = [f"{package}.{entry.name}" for package in packages if package]
            modules = [importlib.import_module(path) for path in paths if importlib.util.find_spec(path)]
            specification = importlib.import_module(f"reference.{entry.name}")
            for name, function in inspect.getmembers(specification, inspect.isfunction):
                public = function.__module__ == specification.__name__ and not name.startswith("_")
                own = [vars(module)[name] for module in modules if name in vars(module)]
                if public and own:
                    offered[f"{entry.name}.{name}"] = own[0]
        return offered

    def function(self, operation: str) -> Callable[..., Any]:
        """Return the function of an operation, as in ``function("ternarize.ternarize")``.

        Raises
        ------
        MissingOperation
            If the backend does not offer it.
        """
        if operation not in self.operations:
            raise MissingOperation(f"backend {self.name} has no function {operation}")
        return self.operations[operation]

    @property
    def precisions(self) -> tuple[str, ...]:
        """Supported dtypes of the weights, the preferred one first."""
        return getattr(self.package, "PRECISIONS", ("float64",))

    @property
    def on_device(self) -> bool:
        """Whether its arrays are in the memory of a CUDA GPU."""
        return not getattr(self.package, "STANDIN", True)

    def ternarize(self, W: Any, C: Any, config: TernaryConfig) -> TernaryMatrix:
        """Ternarize W, given C (each NumPy or DLPack); the result holds arrays of the backend."""
        return self.function("ternarize.ternarize")(self.to_device(W), self.to_device(C), config=config)

    def on_stream(self, pointer: int) -> AbstractContextManager[None]:
        """Run on a CUDA stream; without effect for a backend without a device."""
        return self.package.on_stream(pointer) if self.on_device else nullcontext()

    def to_device(self, array: Any) -> Any:
        """Convert a NumPy array, or a DLPack array of another library, to an array of the backend."""
        return getattr(self.package, "to_device", _as_numpy)(array)

    def to_host(self, array: Any) -> Any:
        """Convert an array of the backend, or a TernaryMatrix, CodedGrid or Layout of them, to NumPy."""
        if isinstance(array, TernaryMatrix):
            moved = ("trits", "scale", "shift", "permutation")
            return replace(array, **{name: self.to_host(getattr(array, name)) for name in moved})
        if isinstance(array, CodedGrid):
            return CodedGrid(*map(self.to_host, (array.codes, array.row, array.block)))
        if isinstance(array, Layout):
            return Layout(**{name: self.to_host(value) for name, value in vars(array).items()})
        return getattr(self.package, "to_host", _unchanged)(array)


def load_backend(name: str = "auto", precision: str | None = None) -> Backend:
    """Load a backend: ``reference``, ``cpu``, ``gpu``, another package with the same modules, or ``auto``.

    ``auto`` means ``gpu`` if this machine has a CUDA GPU and the required packages, else ``cpu``, which is
    `harness.cpu`: compiled loops, held to the reference like any backend.

    Parameters
    ----------
    name : str
        Name of the package.
    precision : {"float32", "float64"}, optional
        dtype of the weights; the backend's preferred one if omitted.

    Raises
    ------
    UserError
        If the backend does not exist, cannot run here, or does not support the precision.
    """
    note = ""
    if name == "auto":
        try:
            package = _package("gpu")
            name, note = "gpu", f"backend auto: gpu ({package.describe()})"
        except UserError as error:
            name, note = CPU, f"backend auto: cpu (NumPy and Numba); {error}"
            package = _package(CPU)
    else:
        package = _package(name)
    backend = Backend(name, package, note=note)
    if precision is not None and precision not in backend.precisions:
        raise UserError(f"backend {name} computes in {' or '.join(backend.precisions)}, not in {precision}")
    return replace(backend, precision=precision or backend.precisions[0])


def _package(name: str) -> ModuleType:
    path = "harness.cpu" if name == CPU else name
    if not name.isidentifier() or importlib.util.find_spec(path) is None:
        raise UserError(f"unknown backend {name!r}: no Python package has this name; use --backend reference")
    try:
        package = importlib.import_module(path)
    except RuntimeError as error:  # raised at import if there is no device
        raise UserError(f"backend {name} cannot run here: {error}") from None
    if importlib.util.find_spec(f"{path}.ternarize") is None:
        raise UserError(
            f"{name!r} is not a backend: it has no module {name}.ternarize; use --backend reference"
        )
    return package


def _unchanged(array: Any) -> Any:
    return array


def _as_numpy(array: Any) -> Any:
    foreign = hasattr(array, "__dlpack__") and not isinstance(array, np.ndarray)
    return np.from_dlpack(array) if foreign else array
