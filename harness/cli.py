"""The frame of every command line: argument types, help, exit codes, and errors in one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from harness.errors import UserError

EXIT_MISS = 1  # a check found a difference


EXIT_USAGE = 2  # the input cannot be used; the message says why


EXIT_INTERRUPTED = 130


# No count is larger, and libraries take no larger ones.
LARGEST = 2**31 - 1


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as written; defaults shown where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def at_least(minimum: int) -> Callable[[str], int]:
    """The type of an argument that must be a whole number from `minimum`."""

    def convert(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {value!r}") from None
        if number < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        if number > LARGEST:
            raise argparse.ArgumentTypeError(f"must be at most {LARGEST}, got {value}")
        return number

    return convert


positive = at_least(1)


# A window of one token predicts nothing.
window_length = at_least(2)


def add_trust_remote_code(parser: argparse.ArgumentParser) -> None:
    """The option that lets code which comes with a model run."""
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _lack_of_memory(error: Exception) -> str | None:
    """What to do about a lack of memory; None if the error says something else."""
    less = "ask for less at a time (fewer or shorter windows, fewer tokens or rows)"
    torch = sys.modules.get("torch")  # which takes seconds to import
    full = torch is not None and isinstance(error, torch.OutOfMemoryError)
    if full or type(error).__module__.startswith("cupy"):
        first = str(error).partition(". ")[0]
        return (
            f"the memory of the GPU is too small ({first}); free some of it, {less}, or do without it "
            "(--backend reference, or --cpu)"
        )
    # torch has no class of its own for the host's.
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"the memory of this machine is too small; free some of it, or {less}"
    return None


def run(main: Callable[[], int]) -> None:
    """Run a command line and exit: bad input and Ctrl-C end in one line, never in a stack trace.

    So does a lack of memory, on the host or on a device.
    """
    # Quantization reads local files and says itself what it does; a hub's bars would hide that.
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        if "transformers" in sys.modules:  # it has read its level as it was imported
            sys.modules["transformers"].logging.set_verbosity_error()
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
    except (MemoryError, RuntimeError) as error:
        reason = _lack_of_memory(error)
        if reason is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        status = EXIT_USAGE
    except OSError as error:  # a path that may not be looked at, or is too long to be one
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"error: {what}", file=sys.stderr)
        status = EXIT_USAGE
    sys.exit(status)
