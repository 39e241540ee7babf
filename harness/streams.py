"""stdout and stderr that take any text, and that nobody needs to read."""

from __future__ import annotations

import codecs
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


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


def discard(stream: Any) -> None:
    """Send all further output of a stream nowhere: its reader (such as head) is gone, or its disk is full."""
    with suppress(OSError):  # as of a stream in memory
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
