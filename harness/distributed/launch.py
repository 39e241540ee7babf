"""Join the processes that torchrun starts, and leave them with one message, whatever happens.

    torchrun --nproc-per-node 4 -m harness.quantize MODEL --out DIR

Every process gets a GPU of its own, if there are any. Only rank 0 prints. A process that fails says why, with
its rank if it is not 0; the others then end without a word. If one dies without a word, the first of those
that are left names it (`watch`). torchrun adds a summary of its own to stderr, which no process can prevent.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from harness.distributed.meet import first_line, in_time, meet, numbers
from harness.distributed.ranks import ALONE, EXIT_FAILED, Ranks
from harness.distributed.watch import DONE, FAILED, STOPPED, Watch
from harness.errors import LostProcess, UserError
from harness.signals import WORDS
from harness.streams import end_unheard, tell
from harness.words import counted

# `watch` notices a process that has died; one that fits a large matrix may keep the others waiting for hours.
PATIENCE = timedelta(days=30)

# Seconds in which another process fails with the same error, if it does.
SAME_ERROR = 3.0

_current = ALONE


def current() -> Ranks:
    """The processes that this one has joined; itself alone outside of `joined`."""
    return _current


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes of this run, if there are any.

    Raises
    ------
    UserError
        If a process cannot be joined.
    LostProcess
        If another process dies.
    """
    global _current
    rank, size = numbers()
    if size == 1:
        yield ALONE
        return
    if rank > 0:
        _be_quiet()
    watch = None
    try:
        _choose_gpu()
        ranks = _join(rank, size)
        watch = Watch(ranks)
        _current = ranks
        yield ranks
        watch.leave(DONE)
    except BaseException as error:
        _leave(rank, watch, error)
        raise
    finally:
        _current = ALONE
    with suppress(RuntimeError):  # another process may have ended since
        distributed.destroy_process_group()


def _be_quiet() -> None:
    """Print nothing: rank 0 does, and every process computes what it prints."""
    sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def _choose_gpu() -> None:
    """Let this process see one GPU; every library then takes it for the only one."""
    place = os.environ.get("LOCAL_RANK")
    if place is None or torch.cuda.is_initialized() or not torch.cuda.is_available():
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if int(place) > len(devices):
        raise SystemExit(EXIT_FAILED)
    if int(place) == len(devices):
        raise UserError(
            f"{socket.gethostname()} has {counted(len(devices), 'GPU')} for "
            f"{os.environ.get('LOCAL_WORLD_SIZE')} processes; use a smaller --nproc-per-node"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(place)]


def _join(rank: int, size: int) -> Ranks:
    store = meet(rank, size)
    store.set_timeout(PATIENCE)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        in_time(
            lambda: distributed.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=PATIENCE
            )
        )
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise UserError(
            f"rank {rank} could not connect to the other processes of this run: {first_line(error)}"
        ) from None
    return Ranks(rank, size)


def _leave(rank: int, watch: Watch | None, error: BaseException) -> None:
    """Return to let an error be reported as in a process that is alone; else report it here, and end."""
    if isinstance(error, SystemExit):  # of argparse, in all processes; or one with nothing to say
        if watch is not None:
            watch.leave(FAILED)
        if rank > 0 and error.code:
            end_unheard(error.code)
        return
    if watch is None:
        if rank > 0 and not isinstance(error, KeyboardInterrupt):
            tell(f"rank {rank} on {socket.gethostname()}: error: {error}")
        return
    for number in WORDS if threading.current_thread() is threading.main_thread() else ():
        signal.signal(number, signal.SIG_IGN)  # of torchrun, as soon as it knows of the other's end
    forced = isinstance(error, LostProcess | KeyboardInterrupt)
    watch.leave(STOPPED if forced else FAILED)
    if not torch.cuda.is_available():  # NCCL would wait for what it has begun
        # Others that wait for this process notice its end by their connections to it.
        with suppress(RuntimeError):
            distributed.destroy_process_group()
    if forced:
        found = watch.verdict()
        if found is None and rank == 0 and isinstance(error, KeyboardInterrupt):
            return
        if found is not None and found.message and found.speaker == rank:
            if rank == 0:
                raise LostProcess(found.message) from None
            tell(f"error: {found.message}")
    elif rank == 0:
        return
    elif not watch.lower_failed(SAME_ERROR):
        what = f"error: {error}" if isinstance(error, UserError) else traceback.format_exc().rstrip()
        tell(f"rank {rank} on {socket.gethostname()}: {what}")
    os._exit(EXIT_FAILED)
