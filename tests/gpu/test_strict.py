"""Host and device arrays do not meet."""

import os
import subprocess
import sys

import pytest

from gpu.device import STANDIN

pytestmark = pytest.mark.skipif(not STANDIN, reason="CuPy itself keeps host and device apart")


@pytest.mark.parametrize("operation", ["atq", "aga", "ssr", "gptq", "ternarize", "packing", "matmul"])
def test_golden_cases_pass_where_arrays_are_kept_apart(operation):
    command = [sys.executable, "-m", "tests.gpu.strict", "--operation", operation, "--precision", "float32"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


@pytest.mark.parametrize("name", ["damping", "factorization", "many_rows", "one_matrix", "precision"])
def test_tests_pass_where_arrays_are_kept_apart(name):
    # What tests do with the arrays that they are given must hold for CuPy's.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.gpu.strict", f"tests/gpu/test_{name}.py"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
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
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}).returncode == 0
