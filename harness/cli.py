"""What the command lines share: how a run ends, and a quiet transformers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

EXIT_MISS = 1  # a check found a difference
EXIT_USAGE = 2  # the input cannot be used; the message says why
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something the user can mend: the message says what was wrong, where, and what to do."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as written, defaults shown."""


def positive(value: str) -> int:
    """An argument that must be a whole number from 1."""
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return number


def run(main: Callable[[], int]) -> None:
    """Run a command line and exit: bad input and Ctrl-C end in one line, never in a stack trace."""
    # Quantization reads local files and says itself what it does; a hub's bars would hide that.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = EXIT_USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (head, say) has gone; nothing more can be printed to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_MISS
    sys.exit(status)
