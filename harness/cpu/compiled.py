"""Compile loops by Numba, and keep what is compiled where a folder can be written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from numba import njit
from numba.core import event


class _Announcement(event.Listener):
    """Tell people at a terminal why the first use of a loop on a machine takes seconds."""

    said = False

    def on_start(self, event: Any) -> None:
        ours = event.data["dispatcher"].py_func.__module__.startswith(__package__)
        if ours and not self.said and sys.stderr.isatty():
            self.said = True
            print("compiling for this CPU; this takes some seconds, once", file=sys.stderr, flush=True)

    def on_end(self, event: Any) -> None:
        """Do nothing."""


announcement = _Announcement()
event.register("numba:compile", announcement)


def compiled(fastmath: Iterable[str] = ()) -> Callable[[Any], Any]:
    """Decorate a loop; it releases the GIL, as matrices are fitted in parallel threads.

    Parameters
    ----------
    fastmath : iterable of str
        What LLVM may do with sums and products, as in ``reassoc``.
    """

    def decorate(function: Any) -> Any:
        options: dict[str, Any] = {"nogil": True, "fastmath": set(fastmath)}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # neither the package nor the user has a folder for it
            return njit(**options)(function)

    return decorate
