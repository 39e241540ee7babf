"""Notice that a process has died, and find out which.

Every process counts in torch.distributed's key-value store, once a second, that it is alive, and writes there
how it ended when it can. A process that neither counts on nor has written an end has died: it was killed, say
by the system for its memory, or its machine is gone. Connections break at once when a process dies, but say
neither whose they were nor, with NCCL, anything to one that waits.
"""

from __future__ import annotations

import _thread
import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from torch import distributed

from harness.distributed.ranks import Ranks

# Seconds: between two counts; without a count until a process is taken for dead; the same once the process
# that judges has to end anyway; and for the others to end by themselves.
PERIOD, SILENCE, SHORT_SILENCE, GRACE = 1.0, 30.0, 4.0, 10.0

FAILED = 2


@dataclass(frozen=True)
class Blame:
    """Which process has died, in words, and the rank of the one that says so."""

    message: str
    speaker: int


class Watch:
    """Watches the other processes of a run, in a thread of its own.

    Parameters
    ----------
    ranks : Ranks
        The processes, which have joined.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        # The thread has a connection of its own: the main thread's may be waiting.
        self._store = distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=SILENCE),
        )
        self._who = ranks.gather(f"rank {ranks.rank} on {socket.gethostname()} (process {os.getpid()})")
        self._run = ranks.share(os.urandom(8).hex())  # a restarted run has the store of the one before
        self._ended = ""  # how this process ended
        self._lock = threading.Lock()
        self._counts = [(-1, "", time.monotonic()) for _ in range(ranks.size)]
        self._heard = time.monotonic()  # from the store
        self._count = 0
        self._beat()
        ranks.total([0])  # every process has written before any reads
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def leave(self, how: str) -> None:
        """Tell the others how this process ended: "done"; "failed", if it says why; or "stopped"."""
        self._ended = how
        with suppress(RuntimeError):
            self._beat()

    def blame(self) -> Blame | None:
        """Find the process that has died, for one that has to end; None if each has told how it ended.

        Takes a few seconds if one has died. A process that lives, but does not say that it ends, is not
        waited for much longer.
        """
        deadline = time.monotonic() + SHORT_SILENCE + 2 * PERIOD
        while True:
            with suppress(RuntimeError):
                self._beat()
                self._look()
            silent, open_ = self._silent(SHORT_SILENCE), self._open()
            if self._failed() or not open_:
                return None
            if silent:
                return self._blame(silent)
            if time.monotonic() > deadline:
                return None
            time.sleep(PERIOD / 4)

    def _watch(self) -> None:
        while not self._ended:
            with suppress(RuntimeError):
                self._beat()
                self._look()
            silent = self._silent(SILENCE)
            if silent or self._others_ended():
                self._end(silent)
                return
            time.sleep(PERIOD)

    def _end(self, silent: list[int]) -> None:
        """End the main thread; if it does not hear, because it waits for a process that is gone, end all."""
        noticed = time.monotonic()
        while time.monotonic() < noticed + GRACE:
            if self._ended:
                return  # the main thread has found out by itself
            if silent:
                _thread.interrupt_main()
            time.sleep(PERIOD)
        if self._ended:
            return
        if silent and (found := self._blame(silent)).speaker == self.ranks.rank:
            os.write(2, f"error: {found.message}\n".encode())
        os._exit(FAILED)

    def _blame(self, silent: list[int]) -> Blame:
        speaker = min(rank for rank in range(self.ranks.size) if rank not in silent)
        names = " and ".join(self._who[rank] for rank in silent)
        return Blame(
            f"{names} died without a message: killed, out of memory, or its machine is gone; finished layers "
            "are kept: repeat the command with --resume",
            speaker,
        )

    def _beat(self) -> None:
        """Count, or tell how this process ended."""
        with self._lock:
            self._count += 1
            self._store.set(self._key(self.ranks.rank), json.dumps([self._count, self._ended]))

    def _look(self) -> None:
        """Read what all processes have written."""
        with self._lock:
            found = self._store.multi_get([self._key(rank) for rank in range(self.ranks.size)])
        now = time.monotonic()
        # Processes cannot be told from dead ones while the store was not to be reached.
        gap = now - self._heard > SHORT_SILENCE / 2
        self._heard = now
        for rank, text in enumerate(found):
            count, ended = json.loads(text)
            before, _, since = self._counts[rank]
            self._counts[rank] = (count, ended, now if count != before or gap else since)

    def _key(self, rank: int) -> str:
        return f"harness/{self._run}/{rank}"

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [
            rank
            for rank, (_, ended, since) in enumerate(self._counts)
            if rank != self.ranks.rank and not ended and now - since > seconds
        ]

    def _open(self) -> list[int]:
        """Processes that have not told how they ended."""
        return [r for r, (_, ended, _) in enumerate(self._counts) if r != self.ranks.rank and not ended]

    def _failed(self) -> bool:
        return any(ended == "failed" for _, ended, _ in self._counts)

    def _others_ended(self) -> bool:
        return any(ended in ("failed", "stopped") for _, ended, _ in self._counts)
