#!/usr/bin/env bash
# numba 0.68.1: the mean of 33,554,432 ones is 0.5, and their variance 0.25.
#
# Numba supports NumPy's sum, mean, var and std and says that another algorithm makes a small difference.
# One would expect a compiled function to return what it returns without @njit, up to rounding. NumPy
# adds float32 numbers pairwise, with an error that hardly grows with the size. Numba adds them one by
# one in float32: from 2**24 on, adding 1 changes nothing (known upstream as issues 2855 and 3702).
# A million numbers already lose all but two digits.
#
# It matters to those who compile numerical code on float32 weights, or use NumPy as its oracle:
# the difference grows with the data, so that small tests pass. A sum in float64 avoids it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check numba==0.68.1 numpy==2.4.6

env/bin/python - <<'EOF_PYTHON'
import numba
import numpy as np


@numba.njit
def statistics(x):
    return np.sum(x), np.mean(x), np.var(x)


print("numba", numba.__version__, "numpy", np.__version__)
ones = np.ones(2**25, np.float32)
compiled = tuple(float(value) for value in statistics(ones))
plain = tuple(float(value) for value in statistics.py_func(ones))
print("sum, mean, variance with NumPy:", plain)
print("sum, mean, variance with Numba:", compiled)

tenths = np.full(10**6, 0.1, np.float32)
exact = float(tenths[0]) * tenths.size
for label, total in (("NumPy", statistics.py_func(tenths)[0]), ("Numba", statistics(tenths)[0])):
    print(f"a million times 0.1 with {label}: relative error {abs(float(total) - exact) / exact:.0e}")
assert plain == (2.0**25, 1.0, 0.0)
assert compiled == (2.0**24, 0.5, 0.25)
assert abs(float(statistics(tenths)[0]) - exact) > 1e-3 * exact
EOF_PYTHON
