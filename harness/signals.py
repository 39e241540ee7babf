"""Ctrl-C and SIGTERM end a program in one line, whenever they arrive."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness.streams import is_first, tell

# What is printed; exit statuses are those that a shell gives.
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def end_at_once() -> None:
    """Make signals end the process in one line and without delay, until `raised` takes over.

    For the seconds in which libraries are imported: nothing can be lost yet, and an exception would end in a
    stack trace, or in the libraries' own code, which turns it into another one or crashes.
    """
    if threading.current_thread() is threading.main_thread():
        for number in WORDS:
            if _is_free(number):
                signal.signal(number, leave)


@contextmanager
def raised() -> Iterator[list[int]]:
    """Make the first signal raise KeyboardInterrupt, and a second one end the process at once.

    Yields a list to which every signal is added as it arrives: libraries may turn the exception into another.
    """
    arrived: list[int] = []

    def note(number: int, frame: Any) -> None:
        arrived.append(number)
        for each in before:
            signal.signal(each, leave)
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in WORDS if in_main_thread and _is_free(number)}
    try:
        for number in before:
            signal.signal(number, note)
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def noted() -> Iterator[threading.Event]:
    """Note the first Ctrl-C instead of raising; a second one ends the process at once.

    Yields an event that is set when it arrives. For work that can be ended early, whose caller goes on.
    """
    event = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        event.set()
        signal.signal(number, leave)

    if threading.current_thread() is not threading.main_thread() or before == signal.SIG_IGN:
        yield event
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _is_free(number: int) -> bool:
    """Whether a signal has no other use: a shell's background processes ignore Ctrl-C, for one."""
    return signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, leave)


def leave(number: int, frame: Any) -> None:
    """End the process at once, in one line; a handler of signals."""
    if is_first():
        tell(WORDS[signal.Signals(number)])
    os._exit(128 + number)
