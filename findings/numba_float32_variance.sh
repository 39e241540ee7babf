#!/usr/bin/env bash
# numba 0.68.1: np.var of two million float32 numbers, 1000 and 1001 in turns, is 283 in Numba; it is 0.25.
#
# Numba's documentation lists np.sum, np.mean, np.var and np.std as supported, and one would expect what NumPy
# gives, up to the last digits. NumPy adds in pairs, so that its error hardly grows with the length. Numba
# compiles a loop that adds one number after the other in float32. The mean of 2**25 ones is then 0.5, as the
# sum stays at 2**24. The square of the mean's error enters the variance: a true 0.25 becomes 283. NumPy is
# right, and so is Numba in float64.
#
# It matters to those who compile statistics of weights or activations, which are millions of float32 numbers:
# the same function gives other results with and without @njit, and nothing fails. Calling it with
# x.astype(np.float64) avoids it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check llvmlite==0.50.0 numba==0.68.1 numpy==2.4.6

env/bin/python - <<'EOF_PYTHON'
from importlib.metadata import version

import numpy as np
from numba import njit

print("numba", version("numba"), "numpy", version("numpy"))


def statistics(x):
    return np.sum(x), np.mean(x), np.var(x), np.std(x)


compiled = njit(statistics)
ones = np.ones(2**25, np.float32)
steps = np.tile(np.array([1000, 1001], np.float32), 2**20)
normal = np.random.default_rng(0).normal(10, 1, 2**22).astype(np.float32)
for name, x in (("2**25 ones", ones), ("1000, 1001, ...", steps), ("normal, mean 10, deviation 1", normal)):
    for run, where in ((statistics, "NumPy"), (compiled, "Numba")):
        for dtype in (np.float32, np.float64):
            found = ", ".join(f"{float(value):.6g}" for value in run(x.astype(dtype)))
            print(f"{name}: {where} {np.dtype(dtype)} sum, mean, variance, deviation: {found}")

assert compiled(ones)[:2] == (2**24, 0.5)
assert statistics(ones)[:2] == (2**25, 1)
assert abs(statistics(steps)[2] - 0.25) < 1e-3 and abs(compiled(steps.astype(np.float64))[2] - 0.25) < 1e-9
assert 280 < compiled(steps)[2] < 290
right = normal.astype(np.float64).mean()
assert abs(statistics(normal)[1] - right) < 1e-5 < 1e-4 < abs(compiled(normal)[1] - right)
EOF_PYTHON
