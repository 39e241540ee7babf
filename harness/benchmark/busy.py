"""Measure how much more CPU time a quantization takes while other programs keep the cores busy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.errors import UserError
from harness.progress import say_on_stderr


def busy_cost(run: Sequence[str], per_core: int) -> dict[str, Any]:
    """Run a quantization on the machine as it is, then beside processes that never wait.

    Parameters
    ----------
    run : sequence of str
        Arguments of ``python -m harness.benchmark run``, after the file.
    per_core : int
        Busy processes for every core.

    Returns
    -------
    dict
        CPU seconds and seconds ``alone`` and ``busy``, and the ratio of the CPU seconds.

    Raises
    ------
    UserError
        If a run fails; it has printed why.
    """
    processes = per_core * (os.cpu_count() or 1)
    alone = _cost(run)
    say_on_stderr(f"the same beside {processes} busy processes")
    with _busy(processes):
        busy = _cost(run)
    ratio = busy["cpu_seconds"] / alone["cpu_seconds"]
    return {"busy_processes": processes, "alone": alone, "busy": busy, "cpu_ratio": round(ratio, 3)}


def _cost(run: Sequence[str]) -> dict[str, float]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        command = [sys.executable, "-m", "harness.benchmark", "run", str(file), *run]
        if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
            raise UserError("the quantization failed; see the message above")
        results = json.loads(file.read_text(encoding="utf-8"))["results"]
    return {name: results[name] for name in ("cpu_seconds", "seconds")}


@contextmanager
def _busy(processes: int) -> Iterator[None]:
    """Keep cores busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()
