"""Compiled loops where nothing can be kept."""

import io
import os
import subprocess
import sys

import numba
import pytest

from harness.cpu.compiled import announcement, compiled


def test_no_folder_can_be_written():
    """Numba then finds no locator; here it is told of none that fits a file."""
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "IPythonCacheLocator"}
    command = [sys.executable, "-c", "import harness.cpu.ternarize"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "times"), [(Terminal, 1), (io.StringIO, 0)])
def test_people_at_a_terminal_are_told_once_that_loops_are_compiled(stream, times, tmp_path, monkeypatch):
    def double(x):
        return 2 * x

    double.__module__ = "harness.cpu.rows"
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))  # which holds nothing from earlier runs
    loop = compiled()(double)
    monkeypatch.setattr(announcement, "said", False)
    monkeypatch.setattr(sys, "stderr", stream())
    assert (loop(1), loop(1.0)) == (2, 2.0)
    assert sys.stderr.getvalue().count("compiling for this CPU") == times


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_torch_is_told_to_wait_without_spinning_unless_the_user_says_how(given, spins):
    rest = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_WAIT"))}
    code = "import harness, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**rest, **given}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(spins)
