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

from harness.distributed.ranks import EXIT_FAILED, Ranks
from harness.streams import tell

# Seconds between two counts.
PERIOD = 1.0
# Seconds without a count until a process is taken for dead: if all is well, and once something has happened.
SILENCE, SHORT_SILENCE = 20.0, 4.0
# Seconds for a process to end by itself.
GRACE = 5.0

# How a process ended: well, with a message of its own, or because it had to.
DONE, FAILED, STOPPED = "done", "failed", "stopped"


@dataclass(frozen=True)
class Verdict:
    """Who says why a run ends, and what, if not a message of its own."""

    speaker: int
    message: str = ""


class Watch:
    """Watches the other processes of a run, in a thread of its own.

    Parameters
    ----------
    ranks : Ranks
        The processes, which have joined.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._rank, self._size = ranks.rank, ranks.size
        self._who = ranks.gather(f"rank {ranks.rank} on {socket.gethostname()} (process {os.getpid()})")
        self._run = ranks.share(os.urandom(8).hex())  # a restarted run has the store of the one before
        self._address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: the main thread's may be waiting.
        patience = timedelta(seconds=SILENCE)
        self._store = distributed.TCPStore(*self._address, is_master=False, timeout=patience)
        self._lock = threading.Lock()
        self._count, self._ended = 0, ""
        now = time.monotonic()
        self._seen = [(0, "", now)] * ranks.size  # count, end, and time of the last count, by rank
        self._heard = now  # when the store answered last
        self._exchange()
        ranks.total([0])  # every process has written before any one reads
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def leave(self, how: str) -> None:
        """Tell the others how this process ended: `DONE`, `FAILED` or `STOPPED`."""
        self._ended = how
        self._exchange(look=False)

    def lower_failed(self, patience: float) -> bool:
        """Whether a process of lower rank fails as well, within some seconds: it has the same to say."""
        deadline = time.monotonic() + patience
        while True:
            self._exchange()
            if any(ended == FAILED for _, ended, _ in self._seen[: self._rank]):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(PERIOD / 4)

    def verdict(self) -> Verdict | None:
        """Find out why this process has to end, once it has told that it does; None if nobody else is why.

        Takes a few seconds if another process has died, or does not tell that it ends.
        """
        deadline = time.monotonic() + 2 * SHORT_SILENCE
        while self._exchange():
            failed = [rank for rank, (_, ended, _) in enumerate(self._seen) if ended == FAILED]
            if failed:
                return Verdict(failed[0])
            if silent := self._silent(SHORT_SILENCE):
                return self._died(silent)
            everyone_ended = all(ended for _, ended, _ in self._seen)
            if everyone_ended or time.monotonic() > deadline:
                return None
            time.sleep(PERIOD / 4)
        return self._lost_store()

    def _watch(self) -> None:
        while not self._ended:
            time.sleep(PERIOD)
            self._exchange()
            if time.monotonic() - self._heard > SILENCE:
                self._end(self._lost_store())
            elif silent := self._silent(SILENCE):
                self._end(self._died(silent))
            elif any(ended in (FAILED, STOPPED) for _, ended, _ in self._seen):
                self._end()

    def _end(self, found: Verdict | None = None) -> None:
        """Interrupt the main thread, and end the process if that does not.

        The main thread may wait for a process that is gone, or for a long fit.
        """
        if found is not None:
            _thread.interrupt_main()
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            time.sleep(PERIOD / 4)
            if self._ended:
                return
        found = found or self.verdict()
        if self._ended:
            return
        if found is not None and found.message and found.speaker == self._rank:
            tell(f"error: {found.message}")
        os._exit(EXIT_FAILED)

    def _lost_store(self) -> Verdict:
        """Without the store, one process of each machine speaks."""
        where = f"{self._address[0]}:{self._address[1]}"
        return Verdict(
            self._rank if os.environ.get("LOCAL_RANK", "0") == "0" else -1,
            f"torchrun, or the process that keeps its store at {where}, has ended; finished layers are kept, "
            "repeat the command with --resume",
        )

    def _died(self, silent: list[int]) -> Verdict:
        names = " and ".join(self._who[rank] for rank in silent)
        speaker = min(rank for rank in range(self._size) if rank not in silent)
        return Verdict(
            speaker,
            f"{names} died: killed, perhaps for its memory, or its machine is gone; finished layers are "
            "kept, repeat the command with --resume",
        )

    def _exchange(self, look: bool = True) -> bool:
        """Write this process's count, or how it ended, and read those of all; False if the store is gone."""
        keys = [f"harness/{self._run}/{rank}" for rank in range(self._size)]
        with self._lock, suppress(RuntimeError):
            self._count += 1
            self._store.set(keys[self._rank], json.dumps([self._count, self._ended]))
            if not look:
                return True
            found = self._store.multi_get(keys)
            now = time.monotonic()
            # While this process was stopped, or the store could not be reached, others may have counted.
            slept = now - self._heard > SHORT_SILENCE
            self._heard = now
            for rank, text in enumerate(found):
                count, ended = json.loads(text)
                before, _, since = self._seen[rank]
                self._seen[rank] = count, ended, now if slept or count != before else since
            return True
        return False

    def _silent(self, seconds: float) -> list[int]:
        """Other processes that have neither counted for some time nor told how they ended.

        Without the store nothing is known of them since it answered last.
        """
        return [
            rank
            for rank, (_, ended, since) in enumerate(self._seen)
            if rank != self._rank and not ended and self._heard - since > seconds
        ]
