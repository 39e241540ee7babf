"""What long work prints where there is no terminal, and what libraries may print beside it."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import progress
from harness.cli import add_verbose
from harness.progress import Progress

Run = Callable[..., int]


class Clock:
    """Stands in for `time`; moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines_of(clock: Clock, total: int, seconds: float) -> list[str]:
    lines: list[str] = []
    with Progress("reading", total, "window", lines.append) as step:
        for _ in range(total):
            clock.now += seconds
            step()
    return lines


def test_work_is_announced_with_its_size_and_its_time_after_the_first_step(clock: Clock) -> None:
    assert lines_of(clock, 4, 10.0) == ["reading: 4 windows", "  about 40 s"]
    assert lines_of(clock, 4, 0.1) == ["reading: 4 windows"]  # too short to speak of
    assert lines_of(clock, 1, 100.0) == ["reading: 1 window"]  # nothing is left to expect
    assert lines_of(clock, 0, 0.0) == ["reading: 0 windows"]


def test_long_work_says_how_far_it_is_once_a_minute(clock: Clock) -> None:
    lines = lines_of(clock, 10, 31.0)
    assert lines[:2] == ["reading: 10 windows", "  about 5 min"]
    # Every second step is more than a minute after the line before.
    assert [line.split(" windows")[0].strip() for line in lines[2:]] == [f"{n} of 10" for n in (2, 4, 6, 8)]
    assert lines[-1].endswith("about 62 s left")


def test_lines_come_through_a_pipe_at_once() -> None:
    """A pipe is buffered: without a flush nothing would be seen until the end."""
    program = (
        "import sys, time\n"
        "from harness.progress import say_on_stdout\n"
        "say_on_stdout('first')\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "first\n"  # while it waits for its input
        running.communicate("")


@pytest.mark.parametrize("verbose", [False, True])
def test_libraries_speak_only_if_asked_to(
    verbose: bool, run_main: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    level = transformers.logging.get_verbosity()

    def main() -> int:
        parser = argparse.ArgumentParser()
        add_verbose(parser)
        parser.parse_args()
        with warnings.catch_warnings(record=True) as caught:  # pytest would keep it from stderr
            warnings.warn("from a library", stacklevel=1)
        print(*(warning.message for warning in caught), file=sys.stderr)
        # Its handler writes to the stream that was there when it was imported.
        if logging.getLogger("transformers").isEnabledFor(logging.WARNING):
            print("from transformers", file=sys.stderr)
        return 0

    try:
        assert run_main(main, *(["--verbose"] if verbose else [])) == 0
    finally:
        transformers.logging.set_verbosity(level)
        os.environ.pop("TRANSFORMERS_VERBOSITY", None)
    printed = capsys.readouterr().err
    assert ("from a library" in printed) == verbose
    assert ("from transformers" in printed) == verbose


@pytest.mark.parametrize("verbose", [False, True])
def test_a_run_in_a_pipe_prints_its_stages_and_no_bar(
    verbose: bool, llama: Path, words_file: Path, tmp_path: Path
) -> None:
    text = ("--calibration", words_file, "--eval", words_file, "--nsamples", 4, "--seqlen", 24)
    command = [sys.executable, "-m", "harness.quantize", llama, "--out", tmp_path / "out", *text]
    command += ["--eval-seqlen", 24, "--block-size", 64, "--backend", "reference"]
    command += ["--verbose"] if verbose else []
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    stages = (
        "loading ",
        "calibration windows",
        "perplexity before",
        "layer   1/3",
        "reading ",
        "perplexity after",
    )
    places = [next(i for i, line in enumerate(lines) if line.startswith(stage)) for stage in stages]
    assert places == sorted(places)
    assert ("Loading weights" in done.stderr) == verbose
    if not verbose:
        assert done.stderr == ""
