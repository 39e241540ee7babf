"""Run a function in several processes that have joined each other, without the seconds that imports take."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable

from harness.distributed.launch import joined
from harness.distributed.ranks import Ranks

Work = Callable[[Ranks], object]


def in_processes(size: int, work: Work) -> None:
    """Run a function in forked processes; fail if it fails in any, with its stack trace on stderr."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_run, args=(rank, size, port, work)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * size
    finally:
        for process in processes:
            process.kill()


def _run(rank: int, size: int, port: int, work: Work) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    stderr, status = sys.__stderr__, 1
    try:
        with joined() as ranks:
            work(ranks)
        status = 0
    except BaseException:
        traceback.print_exc(file=stderr)
    finally:
        os._exit(status)
