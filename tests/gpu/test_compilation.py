"""Every kernel compiles for the GPUs people have, which shows errors of type without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_to_ptx(capability):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), str(capability)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # lanes.py is what the kernels of the other files are made of.
    kernels = {path.stem for path in (ROOT / "gpu" / "kernels").glob("*.py")} - {"__init__", "lanes"}
    assert kernels == {line.split(".")[0] for line in done.stdout.splitlines()}
