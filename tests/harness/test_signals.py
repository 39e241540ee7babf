"""Ctrl-C and SIGTERM end every program in one line, also while libraries are imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import harness
from harness.errors import UserError

Run = Callable[..., int]

ENDS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
BOTH = pytest.mark.parametrize("number", ENDS)

# Raising here would be caught, as libraries do, or leave the interpreter half made.
ARRIVES = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.{name})
    time.sleep(30)
except BaseException as error:
    raise ImportError("caught") from None
"""


def programs() -> list[str]:
    """Every module that a user runs."""
    root = Path(harness.__file__).parent
    files = [file for file in root.rglob("*.py") if '__name__ == "__main__"' in file.read_text("utf-8")]
    names = [".".join(file.relative_to(root.parent).with_suffix("").parts) for file in files]
    return sorted(name.removesuffix(".__main__") for name in names)


def test_all_programs_are_known() -> None:
    assert {"harness.quantize", "harness.evaluate", "harness.hardware"} < set(programs())
    assert len(programs()) == 13


@BOTH
@pytest.mark.parametrize(
    ("program", "library"),
    [
        *((program, "numpy") for program in programs()),
        ("harness.evaluate", "torch"),
        ("harness.quantize", "transformers"),
    ],
)
def test_a_signal_during_imports_ends_in_one_line(
    program: str, library: str, number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / f"{library}.py").write_text(ARRIVES.format(name=number.name))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", program, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        # What a shell starts in the background, as it may these tests, ignores Ctrl-C, like its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        check=False,
    )
    status, word = ENDS[number]
    assert (done.returncode, done.stderr) == (status, f"{word}\n")


@BOTH
def test_of_several_processes_the_first_alone_speaks(number: signal.Signals) -> None:
    """torchrun sends its signal to all."""
    program = f"import os, signal, harness.signals as s; s.end_at_once(); os.kill(os.getpid(), {int(number)})"
    for rank in range(2):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}
        command = [sys.executable, "-c", program]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            check=False,
        )
        status, word = ENDS[number]
        assert (done.returncode, done.stderr) == (status, "" if rank else f"{word}\n")


@BOTH
@pytest.mark.parametrize(
    "error", [None, ImportError("half"), UserError("no model"), SystemError(), SystemExit(2)]
)
def test_a_signal_later_is_told_whatever_a_library_makes_of_it(
    error: BaseException | None, number: signal.Signals, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        except KeyboardInterrupt:
            if error is None:
                raise
            raise error from None
        return 0

    before = {each: signal.getsignal(each) for each in ENDS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status, word = ENDS[number]
        assert run_main(main) == status
        assert capsys.readouterr().err == f"{word}\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    finally:
        signal.signal(signal.SIGINT, before[signal.SIGINT])


RUNS = """
import os, signal, sys, time
from harness.cli import run
def main():
    try:
        print("ready", flush=True)
        signal.pause()
    finally:
        print("tidying", flush=True)
        time.sleep(30)
run(main)
"""


@BOTH
def test_a_second_signal_ends_what_does_not_end(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", RUNS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None
        for line in ("ready\n", "tidying\n"):
            assert process.stdout.readline() == line
            process.send_signal(number)
        _, error = process.communicate(timeout=20)
    status, word = ENDS[number]
    assert (process.returncode, error) == (status, f"{word}\n")


@BOTH
def test_signals_that_are_ignored_stay_so(number: signal.Signals) -> None:
    """As Ctrl-C is by what a shell has started in the background."""
    program = (
        f"import os, harness; from harness.cli import run; run(lambda: os.kill(os.getpid(), {int(number)}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_importing_the_package_changes_no_signals() -> None:
    program = (
        "import signal; before = [signal.getsignal(n) for n in (2, 15)]; import harness, harness.cli; "
        "assert before == [signal.getsignal(n) for n in (2, 15)]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
