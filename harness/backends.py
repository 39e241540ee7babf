"""Backends by package name: where an operation ``module.function`` is found."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from harness.cli import UserError
from reference.types import TernaryConfig, TernaryMatrix


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
        It may define ``REFUSED``, operations it leaves out on purpose, and the functions
        ``to_device`` and ``to_host`` if its arrays are not NumPy's. Where it cannot run, importing
        it raises a RuntimeError that says why.
    note : str
        What was chosen and why, where the name left that open.
    """

    name: str
    package: ModuleType
    note: str = ""

    @property
    def refused(self) -> frozenset[str]:
        """Operations that the backend leaves out on purpose."""
        return frozenset(getattr(self.package, "REFUSED", ()))

    def function(self, operation: str) -> Callable[..., Any]:
        """The function of an operation, as in ``function("ternarize.ternarize")``.

        Raises
        ------
        MissingOperation
            If the backend has no such module or function.
        """
        module_name, _, function_name = operation.rpartition(".")
        path = f"{self.name}.{module_name}"
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
            raise MissingOperation(f"backend {self.name} has no module {module_name}") from None
        function = getattr(module, function_name, None)
        if function is None:
            raise MissingOperation(f"backend {self.name} has no function {operation}")
        return function

    def ternarize(self, W: np.ndarray, C: np.ndarray, config: TernaryConfig) -> TernaryMatrix:
        """The operation ``ternarize.ternarize`` on NumPy arrays, from the host and back to it."""
        return self.to_host(
            self.function("ternarize.ternarize")(self.to_device(W), self.to_device(C), config=config)
        )

    def to_device(self, array: Any) -> Any:
        """A NumPy array as the backend takes it."""
        return getattr(self.package, "to_device", _unchanged)(array)

    def to_host(self, array: Any) -> Any:
        """An array of the backend as NumPy's, or a TernaryMatrix of such arrays."""
        if isinstance(array, TernaryMatrix):
            moved = ("trits", "scale", "shift", "permutation")
            return replace(array, **{name: self.to_host(getattr(array, name)) for name in moved})
        return getattr(self.package, "to_host", _unchanged)(array)


def load_backend(name: str = "auto") -> Backend:
    """The backend of a name: ``reference``, ``gpu``, any package of the same shape, or ``auto``.

    ``auto`` is ``gpu`` where there is a CUDA device and what it needs is installed, else ``reference``.

    Raises
    ------
    UserError
        If there is no such backend, or no device for it.
    """
    if name == "auto":
        try:
            gpu = load_backend("gpu")
        except UserError as error:
            return Backend(
                "reference",
                importlib.import_module("reference"),
                f"{error}; auto is reference (NumPy, float64)",
            )
        return replace(gpu, note=f"backend auto: gpu ({gpu.package.describe()})")
    if not name.isidentifier() or importlib.util.find_spec(name) is None:
        raise UserError(f"unknown backend {name!r}: there is no Python package of that name; use reference")
    try:
        package = importlib.import_module(name)
    except RuntimeError as error:  # no device: the package says so as it is imported
        raise UserError(f"backend {name} cannot run here: {error}") from None
    if importlib.util.find_spec(name + ".ternarize") is None:
        raise UserError(f"{name!r} is no backend: it has no module {name}.ternarize; use reference")
    return Backend(name, package)


def _unchanged(array: Any) -> Any:
    return array
