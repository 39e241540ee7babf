"""Progress of long work: a bar on a terminal, lines with the expected time elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

from harness.machine import duration
from harness.streams import discard
from harness.words import counted

Say = Callable[[str], object]

# Seconds: shorter work gets no time estimate; least time between two progress lines.
SHORT, BETWEEN_LINES = 5.0, 60.0


def say_on_stdout(line: str) -> None:
    """Print a line to stdout above any bar."""
    _say(line, sys.stdout)


def say_on_stderr(line: str) -> None:
    """Print a line to stderr above any bar, where stdout carries machine-readable output."""
    _say(line, sys.stderr)


def _say(line: str, stream: Any) -> None:
    """Print a line and flush it, as a pipe would buffer it. If that fails, long work goes on unread."""
    try:
        tqdm.write(line, file=stream)
        stream.flush()
    except OSError:
        discard(stream)


class Progress:
    """Counts finished steps and shows the progress.

    Parameters
    ----------
    what : str
        The work, such as "perplexity of the original".
    total : int
        Number of steps.
    unit : str
        One step, such as "window".
    say : callable
        Prints a line, where there is no terminal for a bar.
    """

    def __init__(self, what: str, total: int, unit: str, say: Say = say_on_stderr) -> None:
        self.what, self.total, self.unit, self.say = what, total, unit, say
        self.done = 0

    def __enter__(self) -> Progress:
        self._bar = tqdm(total=self.total, desc=self.what, unit=self.unit, disable=None, leave=False)
        if self._bar.disable:
            self.say(f"{self.what}: {counted(self.total, self.unit)}")
        self._began = self._said = time.monotonic()
        return self

    def __call__(self, steps: int = 1) -> None:
        """Count finished steps."""
        self._bar.update(steps)
        first, self.done = self.done == 0, self.done + steps
        if not self._bar.disable or self.done >= self.total:
            return
        now = time.monotonic()
        left = (now - self._began) / self.done * (self.total - self.done)
        if first and left > SHORT:
            self.say(f"  about {duration(now - self._began + left)}")
        elif now - self._said > BETWEEN_LINES:
            self.say(f"  {self.done:,} of {counted(self.total, self.unit)}, about {duration(left)} left")
            self._said = now

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
