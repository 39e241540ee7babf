#!/usr/bin/env bash
# numpy 2.4.6: pinv and lstsq of a float32 matrix take its rounding errors for rank.
#
# X.T @ X of 20 tokens and 64 columns has rank 20, and in float32 its other singular values are rounding,
# about 1e-7 of the largest. np.linalg.matrix_rank finds 20. One would expect pinv and lstsq to cut off at the
# precision of float32 too, as scipy.linalg does, and lstsq documents machine precision. pinv cuts at 1e-15 of
# the largest value and lstsq at 64 times the epsilon of float64, whatever the dtype. Both keep all 64, return
# float32, and the pseudoinverse is tens of millions of times too large.
#
# It matters to those who solve with Hessians or covariances of fewer tokens than columns, as for experts that
# few tokens reach: the result is finite and is noise. rtol=64 * eps for pinv and rcond=64 * eps for lstsq
# avoid it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export OPENBLAS_NUM_THREADS=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check numpy==2.4.6 scipy==1.17.1

env/bin/python - <<'EOF_PYTHON'
from importlib.metadata import version

import numpy as np
import scipy.linalg

print("numpy", version("numpy"), "scipy", version("scipy"))
tokens, columns = 20, 64
x = np.random.default_rng(0).normal(size=(tokens, columns))
exact = np.linalg.pinv(x.T @ x)  # float64
right = np.abs(exact).max()
gram = x.astype(np.float32).T @ x.astype(np.float32)
outputs = gram @ np.ones(columns, np.float32)
shortest = np.linalg.lstsq(x.T @ x, x.T @ x @ np.ones(columns))[0]
epsilon = columns * np.finfo(np.float32).eps
assert np.linalg.matrix_rank(gram) == tokens

inverses = {
    "numpy pinv": np.linalg.pinv(gram),
    "numpy pinv, hermitian": np.linalg.pinv(gram, hermitian=True),
    "numpy pinv with rtol": np.linalg.pinv(gram, rtol=epsilon),
    "scipy pinv": scipy.linalg.pinv(gram),
}
size = {name: float(np.abs(inverse).max() / right) for name, inverse in inverses.items()}
for name, ratio in size.items():
    assert inverses[name].dtype == np.float32
    print(f"{name}: largest entry {ratio:.6g} times the right one")
assert size["numpy pinv"] > 1e6 and size["numpy pinv, hermitian"] > 1e6
assert abs(size["numpy pinv with rtol"] - 1) < 1e-3 and abs(size["scipy pinv"] - 1) < 1e-3

found = {
    "numpy lstsq": np.linalg.lstsq(gram, outputs),
    "numpy lstsq with rcond": np.linalg.lstsq(gram, outputs, rcond=epsilon),
    "scipy lstsq": scipy.linalg.lstsq(gram, outputs),
}
for name, (solution, _, rank, _) in found.items():
    error = float(np.linalg.norm(solution - shortest) / np.linalg.norm(shortest))
    print(f"{name}: rank {rank}, relative error of the shortest solution {error:.2g}")
    assert solution.dtype == np.float32
    assert (rank == columns and error > 1) if name == "numpy lstsq" else (rank == tokens and error < 1e-3)
EOF_PYTHON
