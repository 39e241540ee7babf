"""Run a function in several processes that have joined each other, without the seconds that imports take."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Event
from typing import Any

from torch import distributed

from harness.cli import run
from harness.distributed.launch import joined
from harness.distributed.ranks import Ranks

Work = Callable[[Ranks], object]


def in_processes(size: int, work: Work) -> None:
    """Run a function in forked processes; fail if it fails in any, with its stack trace on stderr."""
    with forked(size, work) as processes:
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [0] * size


@contextmanager
def forked(size: int, work: Work, **environment: str) -> Any:
    """Start a function in forked processes; kill those that are left in the end.

    As with torchrun, the store is kept by a process that does not take part. No process may reach it before
    all are forked: the store's thread looks up the names of those that do, and a process that is forked
    meanwhile would wait for the C library's lock for ever. `environment` changes what processes are told.
    """
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    told |= {"TORCHELASTIC_USE_AGENT_STORE": "True"} | environment
    context = multiprocessing.get_context("fork")
    all_forked = context.Event()
    arguments = [(rank, told, all_forked, work) for rank in range(size)]
    processes = [context.Process(target=_run, args=own) for own in arguments]
    for process in processes:
        process.start()
    all_forked.set()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def end(processes: list[ForkProcess], seconds: float) -> float:
    """Do as torchrun: once a process fails, end the others by SIGTERM; return the seconds until all ended."""
    began = time.monotonic()
    told = False
    while any(process.is_alive() for process in processes):
        assert time.monotonic() - began < seconds, "processes go on without one that has died"
        if not told and any(process.exitcode for process in processes):
            told = True
            for process in processes:
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.02)
    return time.monotonic() - began


def _run(rank: int, told: dict[str, str], all_forked: Event, work: Work) -> None:
    all_forked.wait()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} | told
    status: Any = 1
    stderr = sys.__stderr__

    def main() -> int:
        with joined() as ranks:
            work(ranks)
        return 0

    try:
        run(main, shared=True)
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc(file=stderr)
    finally:
        if stderr is not None:
            stderr.flush()
        os._exit(status)
