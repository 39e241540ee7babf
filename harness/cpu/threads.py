"""Share rows among threads that sleep while they wait; NumPy's and torch's own would spin."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

__all__ = ["share_rows"]

_pool: ThreadPoolExecutor | None = None
_owner = 0


def share_rows(function: Callable[[int, int], object], rows: int, threads: int) -> None:
    """Call a function with ranges of rows, begin and end, that together are all rows, at the same time.

    Parameters
    ----------
    function : callable
        Releases the GIL.
    rows : int
        How many there are.
    threads : int
        Ranges, and threads to work on them; the calling thread is one.
    """
    global _pool, _owner
    if threads <= 1:
        function(0, rows)
        return
    if _pool is None or _owner != os.getpid():  # threads do not survive a fork
        _pool, _owner = ThreadPoolExecutor(os.cpu_count() or 1, "pt2-llm"), os.getpid()
    ends = [rows * part // threads for part in range(threads + 1)]
    others = [_pool.submit(function, *ends[part : part + 2]) for part in range(1, threads)]
    function(ends[0], ends[1])
    for other in others:
        other.result()
