"""Compile loops by Numba, and keep what is compiled where a folder can be written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from numba import njit


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
