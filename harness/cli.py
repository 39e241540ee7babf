"""Shared by all command lines: argument types, help formatting, exit codes, one-line errors."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.errors import UserError

EXIT_MISS = 1  # a check failed
EXIT_USAGE = 2  # unusable input; the message says why
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143  # as a shell reports a process that SIGTERM has ended

# The largest count that is accepted: libraries take 32-bit integers.
LARGEST = 2**31 - 1


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of descriptions; show defaults other than None and False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def at_least(minimum: int) -> Callable[[str], int]:
    """Return an argparse type for integers of at least `minimum`."""

    def convert(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, got {value!r}") from None
        if number < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        if number > LARGEST:
            raise argparse.ArgumentTypeError(f"must be at most {LARGEST}, got {value}")
        return number

    return convert


def share(value: str) -> float:
    """An argparse type for numbers from 0 to 1."""
    try:
        number = float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {value!r}") from None
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {value}")
    return number


positive = at_least(1)
# A window of one token has nothing to predict.
window_length = at_least(2)


def path(value: str) -> Path:
    """Convert an argument that names a file or folder; refuse an empty one, which pathlib takes for "."."""
    if not value:
        raise argparse.ArgumentTypeError("is empty; is a shell variable unset?")
    return Path(value)


def add_trust_remote_code(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--trust-remote-code``."""
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="allow Python code shipped with the model to run"
    )


class _Verbose(argparse.Action):
    """A switch that lets libraries print their log, progress bars and warnings."""

    def __call__(self, *arguments: Any, **rest: Any) -> None:
        if not sys.warnoptions:
            warnings.resetwarnings()
        if os.environ["TRANSFORMERS_VERBOSITY"] in ("error", "critical", "warning"):
            _set_verbosity("info")


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--verbose``."""
    what = "also print log lines, progress bars and warnings of the libraries used"
    parser.add_argument("--verbose", action=_Verbose, nargs=0, dest=argparse.SUPPRESS, help=what)


def _set_verbosity(level: str) -> None:
    """Set the log level of transformers, on which `harness.models` makes its loading bars depend."""
    os.environ["TRANSFORMERS_VERBOSITY"] = level
    if "transformers" in sys.modules:  # it read its log level at import
        logging = sys.modules["transformers"].logging
        logging.set_verbosity(logging.log_levels[level])


def _out_of_memory_message(error: Exception) -> str | None:
    """Explain an out-of-memory error; return None for any other error."""
    less = "use fewer or shorter windows, or fewer tokens or rows"
    torch = sys.modules.get("torch")  # importing it would take seconds
    full = torch is not None and isinstance(error, torch.OutOfMemoryError)
    if full or type(error).__module__.startswith("cupy"):
        first = str(error).partition(". ")[0]
        return (
            f"out of GPU memory ({first}); free some, {less}, or run on the CPU "
            "(--backend reference, or --cpu)"
        )
    # torch raises a plain RuntimeError when the host is out of memory.
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"this machine is out of memory; free some, or {less}"
    return None


class _Terminated(KeyboardInterrupt):
    """SIGTERM has arrived: a scheduler, a container or `kill` wants the process to end."""


def _on_terminate(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
    raise _Terminated


def run(main: Callable[[], int]) -> None:
    """Run a command line and exit with its status.

    Bad input, Ctrl-C, SIGTERM and a lack of memory (host or device) print one line instead of a stack trace.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _on_terminate) if in_main_thread else None
    # The programs print their own progress; what libraries print would bury it.
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        _set_verbosity("error")
    if not sys.warnoptions:  # python -W, PYTHONWARNINGS
        warnings.simplefilter("ignore")
    try:
        status = main()
        if sys.stdout is not None:  # closed by the shell, as in >&-
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = EXIT_USAGE
    except _Terminated:
        print("terminated", file=sys.stderr)
        status = EXIT_TERMINATED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of the pipe (such as head) is gone; nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_MISS
    except (MemoryError, RuntimeError) as error:
        reason = _out_of_memory_message(error)
        if reason is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        status = EXIT_USAGE
    except OSError as error:  # a path without read permission, or one that is too long
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"error: {what}", file=sys.stderr)
        status = EXIT_USAGE
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    sys.exit(status)
