"""The link from a function of `gpu` to the function of `reference` that it mirrors."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def twin(function: Callable[P, R]) -> Callable[P, R]:
    """Document a function of ``gpu.MODULE`` by its twin, the function of that name in ``reference.MODULE``.

    Only the twin's docstring and signature are read. `gpu` never calls the reference, which is its oracle.

    Parameters
    ----------
    function : callable
        Its own docstring, if it has one, says what differs on the device, and is added to the twin's Notes.

    Returns
    -------
    callable
        `function` itself.

    Raises
    ------
    AttributeError
        If the reference has no function of that name.
    TypeError
        If the parameters differ from the twin's in name, kind or default.
    """
    module = importlib.import_module(f"reference.{function.__module__.removeprefix('gpu.')}")
    mirrored = getattr(module, function.__name__)
    ours, theirs = _signature(function), _signature(mirrored)
    if ours != theirs:
        raise TypeError(f"{function.__module__}.{function.__name__}{ours} differs from its twin's {theirs}")
    documentation = inspect.getdoc(mirrored)
    if documentation:  # python -OO has none
        function.__doc__ = _with_note(
            documentation.replace("array_like", "device array"), inspect.getdoc(function)
        )
    return function


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature without annotations, which name other array types here."""
    parameters = inspect.signature(function).parameters.values()
    return inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])


def _with_note(documentation: str, note: str | None) -> str:
    """Append a paragraph to the Notes of a docstring, before its Examples."""
    if note is None:
        return documentation
    body, heading, examples = documentation.partition("\n\nExamples\n--------\n")
    notes = "" if "\n\nNotes\n-----\n" in body else "Notes\n-----\n"
    return f"{body}\n\n{notes}{note}{heading}{examples}"
