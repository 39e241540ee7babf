"""Host and device arrays do not meet."""

import subprocess
import sys

import pytest

from gpu.device import STANDIN

pytestmark = pytest.mark.skipif(not STANDIN, reason="CuPy itself keeps host and device apart")


# What tests do with the arrays that they are given must hold for CuPy's.
FILES = [
    f"tests/gpu/test_{name}.py"
    for name in (
        "damping",
        "dequantize",
        "factorization",
        "many_rows",
        "one_matrix",
        "precision",
        "refine",
        "targets",
    )
]


@pytest.mark.parametrize(
    "program",
    [["tests.gpu.strict", "--precision", "float32"], ["pytest", "-q", "-p", "tests.gpu.strict", *FILES]],
    ids=["golden cases", "tests"],
)
def test_passes_where_arrays_are_kept_apart(program):
    result = subprocess.run([sys.executable, "-m", *program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def test_what_is_kept_apart():
    code = """
from tests.gpu import strict
strict.install()
from gpu.device import xp
import numpy as np
a = xp.ones((2, 3))
for meeting in (
    lambda: a + np.ones(3),
    lambda: np.concatenate([a, a]),
    lambda: a[np.array([1])],
    lambda: xp.stack([np.ones(2)]),
    lambda: a.__setitem__(0, np.ones(3)),
    lambda: xp.ones(3, np.float32).var(dtype=np.float64),
):
    try:
        meeting()
    except TypeError:
        continue
    raise SystemExit(1)
assert isinstance(a.sum(axis=0) * np.float64(2), strict.DeviceArray)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
