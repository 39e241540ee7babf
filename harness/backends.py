"""Backends by package name, and the operations that they offer."""

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


class MissingOperation(LookupError):
    """A backend that lacks an operation of the reference."""


@dataclass(frozen=True)
class Backend:
    """A package with the modules and functions of `reference`.

    Attributes
    ----------
    name : str
        Name of the package.
    package : module
        It may define ``REFUSED``, operations it leaves out on purpose; ``PRECISIONS``, if it computes
        in more than float64; and if its arrays are not NumPy's, the functions ``to_device``, ``to_host``,
        ``on_stream`` and ``use_allocator`` of `gpu.device`. Where it cannot run, importing it raises a
        RuntimeError that says why.
    precision : str
        Type of the weights it is given.
    note : str
        What was chosen and why, where the name left that open.
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
        names, whether it defines or imports them.
        """
        offered = {}
        for entry in pkgutil.iter_modules(reference.__path__):
            path = f"{self.name}.{entry.name}"
            if importlib.util.find_spec(path) is None:
                continue
            specification = importlib.import_module(f"reference.{entry.name}")
            own = vars(importlib.import_module(path))
            for name, function in inspect.getmembers(specification, inspect.isfunction):
                public = function.__module__ == specification.__name__ and not name.startswith("_")
                if public and name in own:
                    offered[f"{entry.name}.{name}"] = own[name]
        return offered

    def function(self, operation: str) -> Callable[..., Any]:
        """The function of an operation, as in ``function("ternarize.ternarize")``.

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
        """Types of weights that it computes with, the preferred one first."""
        return getattr(self.package, "PRECISIONS", ("float64",))

    @property
    def on_device(self) -> bool:
        """Whether its arrays are in the memory of a CUDA device."""
        return not getattr(self.package, "STANDIN", True)

    def ternarize(self, W: Any, C: Any, config: TernaryConfig) -> TernaryMatrix:
        """The operation ``ternarize.ternarize`` on what `to_device` takes, to arrays of the backend."""
        return self.function("ternarize.ternarize")(self.to_device(W), self.to_device(C), config=config)

    def on_stream(self, pointer: int) -> AbstractContextManager[None]:
        """Work on a CUDA stream; nothing is changed for a backend without a device."""
        return self.package.on_stream(pointer) if self.on_device else nullcontext()

    def to_device(self, array: Any) -> Any:
        """A NumPy array, or one of another library through DLPack, as the backend takes it."""
        return getattr(self.package, "to_device", _as_numpy)(array)

    def to_host(self, array: Any) -> Any:
        """An array of the backend as NumPy's, or a TernaryMatrix or Layout of such arrays."""
        if isinstance(array, TernaryMatrix):
            moved = ("trits", "scale", "shift", "permutation")
            return replace(array, **{name: self.to_host(getattr(array, name)) for name in moved})
        if isinstance(array, CodedGrid):
            return CodedGrid(*map(self.to_host, (array.codes, array.row, array.block)))
        if isinstance(array, Layout):
            return Layout(**{name: self.to_host(value) for name, value in vars(array).items()})
        return getattr(self.package, "to_host", _unchanged)(array)


def load_backend(name: str = "auto", precision: str | None = None) -> Backend:
    """The backend of a name: ``reference``, ``gpu``, any package of the same shape, or ``auto``.

    ``auto`` is ``gpu`` where there is a CUDA device and what it needs is installed, else ``reference``.

    Parameters
    ----------
    name : str
        Name of the package.
    precision : {"float32", "float64"}, optional
        Type of the weights; what the backend prefers if left out.

    Raises
    ------
    UserError
        If there is no such backend, no device for it, or it does not compute in that precision.
    """
    note = ""
    if name == "auto":
        try:
            package = _package("gpu")
            name, note = "gpu", f"backend auto: gpu ({package.describe()})"
        except UserError as error:
            name, note = "reference", f"{error}; auto is reference (NumPy, float64)"
            package = _package("reference")
    else:
        package = _package(name)
    backend = Backend(name, package, note=note)
    if precision is not None and precision not in backend.precisions:
        raise UserError(f"backend {name} computes in {' or '.join(backend.precisions)}, not in {precision}")
    return replace(backend, precision=precision or backend.precisions[0])


def _package(name: str) -> ModuleType:
    if not name.isidentifier() or importlib.util.find_spec(name) is None:
        raise UserError(f"unknown backend {name!r}: there is no Python package of that name; use reference")
    try:
        package = importlib.import_module(name)
    except RuntimeError as error:  # no device: the package says so as it is imported
        raise UserError(f"backend {name} cannot run here: {error}") from None
    if importlib.util.find_spec(name + ".ternarize") is None:
        raise UserError(f"{name!r} is no backend: it has no module {name}.ternarize; use reference")
    return package


def _unchanged(array: Any) -> Any:
    return array


def _as_numpy(array: Any) -> Any:
    foreign = hasattr(array, "__dlpack__") and not isinstance(array, np.ndarray)
    return np.from_dlpack(array) if foreign else array
