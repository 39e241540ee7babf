"""Compiled loops where nothing can be kept."""

import os
import subprocess
import sys


def test_no_folder_can_be_written():
    """Numba then finds no locator; here it is told of none that fits a file."""
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "IPythonCacheLocator"}
    command = [sys.executable, "-c", "import harness.cpu.ternarize"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
