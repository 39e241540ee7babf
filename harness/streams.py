"""stdout and stderr that take any text, and that nobody needs to read."""

from __future__ import annotations

import codecs
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

# Seconds that a process leaves another one to say why both end; torchrun then ends it.
HEAD_START = 60.0


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Escape characters that a stream cannot hold as JSON does: a JSON text stays one."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error("harness.escape", _escape)


def make_writable() -> None:
    """Let stdout and stderr take any text, whatever the locale, and be there if a shell has closed them."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure") and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="harness.escape")


def is_first() -> bool:
    """Whether this process is alone, or the first of those that torchrun started: the one that prints."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def end_unheard(status: Any) -> NoReturn:
    """End without a word, but after the process that says why: torchrun ends all when one has failed."""
    time.sleep(HEAD_START)
    raise SystemExit(status)


def tell(line: str) -> None:
    """Write a line to the process's stderr, at once, and wherever `sys.stderr` leads."""
    with suppress(OSError):  # it may be closed
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))


def discard(stream: Any) -> None:
    """Send all further output of a stream nowhere: its reader (such as head) is gone, or its disk is full."""
    with suppress(OSError):  # as of a stream in memory
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
