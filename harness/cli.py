"""Shared by all command lines: argument types, help formatting, exit codes, one-line errors."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.errors import LostProcess, UserError
from harness.signals import WORDS, raised
from harness.streams import discard, end_unheard, is_first, make_writable

EXIT_MISS = 1  # a check failed
EXIT_USAGE = 2  # unusable input; the message says why
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM

# The largest count that is accepted: libraries take 32-bit integers.
LARGEST = 2**31 - 1


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of descriptions; show defaults as one types them, unless off or empty."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
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
    return Path(model_name(value))


def model_name(value: str) -> str:
    """Refuse a name that is not Unicode, which the libraries that read and write models do not take."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(
            f"{value!a} is not a name in {sys.getfilesystemencoding().upper()}, as this system's names "
            "should be; rename it, or set a locale with UTF-8"
        ) from None
    return value


def refuse_idle(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, idle: Mapping[str, str]
) -> None:
    """Refuse options that the command line gives, be it with their default values, and that change nothing.

    Parameters
    ----------
    parser, arguments
        The parser, and what it made of the command line.
    idle : mapping of str to str
        Names of options that change nothing, each with the reason: "without --tasks".

    Raises
    ------
    UserError
        The message names the option.
    """
    unset = object()
    unread = argparse.Namespace(**dict.fromkeys(arguments.__dict__, unset))
    given = parser.parse_args(namespace=unread).__dict__
    for name, reason in idle.items():
        if given[name] is not unset:
            raise UserError(f"--{name.replace('_', '-')} has no effect {reason}; drop it")


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


def run(main: Callable[[], int], shared: bool = False) -> None:
    """Run a command line and exit with its status.

    `shared` says whether processes of torchrun can share the program's work (`harness.distributed`).

    Bad input, Ctrl-C, SIGTERM and a lack of memory (host or device) print one line instead of a stack trace.
    """
    make_writable()
    # The programs print their own progress; what libraries print would bury it.
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        _set_verbosity("error")
    if not sys.warnoptions:  # python -W, PYTHONWARNINGS
        warnings.simplefilter("ignore")
    status: Any
    with raised() as arrived:
        try:
            try:
                if not shared and "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
                    if not is_first():
                        end_unheard(EXIT_USAGE)
                    raise UserError("this program runs in one process; start it without torchrun")
                status = main()
            except SystemExit as error:  # of argparse, after its help or a usage error
                if arrived:
                    raise
                status = error.code
            sys.stdout.flush()
        except BaseException as error:
            lost = isinstance(error, LostProcess)  # why the others had to be stopped by signals
            if not lost and (arrived or isinstance(error, KeyboardInterrupt)):
                status = _ended_by(arrived[0] if arrived else signal.SIGINT)
            else:
                status = _explain(error)
    sys.exit(status)


def _ended_by(number: int) -> int:
    if is_first():
        _print_error(WORDS[signal.Signals(number)])
    return 128 + number


def _explain(error: BaseException) -> int:
    """Print an error that has an explanation in one line, and return the exit status; raise any other."""
    if isinstance(error, UserError):
        reason: str | None = str(error)
    elif isinstance(error, BrokenPipeError):
        discard(sys.stdout)
        return EXIT_MISS
    elif isinstance(error, MemoryError | RuntimeError):
        reason = _out_of_memory_message(error)
    elif isinstance(error, OSError):  # a path without read permission, or one that is too long
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    else:
        reason = None
    if reason is None:
        raise error
    _print_error(f"error: {reason}")
    return EXIT_USAGE


def _print_error(line: str) -> None:
    with suppress(OSError):  # whoever read stderr may be gone
        print(line, file=sys.stderr, flush=True)
