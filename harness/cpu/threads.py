"""Share work among threads that sleep while they wait; NumPy's and torch's own would spin."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

__all__ = ["share"]

_pool: ThreadPoolExecutor | None = None
_owner = 0


def share(function: Callable[[int, int], object], count: int, threads: int) -> None:
    """Call a function with ranges, begin and end, that together are all of a count, at the same time.

    Parameters
    ----------
    function : callable
        Releases the GIL.
    count : int
        How many rows, or whatever it works on, there are.
    threads : int
        Most ranges, and threads to work on them; the calling thread is one.
    """
    global _pool, _owner
    threads = min(threads, count)
    if threads <= 1:
        function(0, count)
        return
    if _pool is None or _owner != os.getpid():  # threads do not survive a fork
        _pool, _owner = ThreadPoolExecutor(os.cpu_count() or 1, "pt2-llm"), os.getpid()
    ends = [count * part // threads for part in range(threads + 1)]
    others = [_pool.submit(function, *ends[part : part + 2]) for part in range(1, threads)]
    function(ends[0], ends[1])
    for other in others:
        other.result()
