#!/usr/bin/env bash
# numpy 2.4.6: einsum of float16 is 300 times less exact in one spelling of a product than in another.
#
# A @ B of float16 adds up in float32 and rounds once, for an error of 0.02 %. One would expect
# np.einsum("ij,jk->ik", A, B) to do the same, and with B transposed in memory, "ij,kj->ik", it does. But in
# the first spelling the innermost loop runs along a row of the result, so every partial sum is stored there,
# in float16. A sum of 4096 products between 0 and 1 stops growing near 1000: the result is 7 % too small.
# optimize=True gives the small error, as it calls tensordot for a plain product.
#
# It matters to those who compute with weights or activations of float16 in NumPy, as files of models have
# them: one letter in the subscripts, or the layout of an array, decides. A @ B avoids it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export OPENBLAS_NUM_THREADS=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check numpy==2.4.6

env/bin/python - <<'EOF_PYTHON'
from importlib.metadata import version

import numpy as np

print("numpy", version("numpy"))
draw = np.random.default_rng(0)
a = draw.random((64, 4096)).astype(np.float16)
b = draw.random((4096, 64)).astype(np.float16)
transposed = np.ascontiguousarray(b.T)
exact = a.astype(np.float64) @ b.astype(np.float64)


def error(product):
    assert product.dtype == np.float16
    return float(np.linalg.norm(product.astype(np.float64) - exact) / np.linalg.norm(exact))


errors = {
    "a @ b": error(a @ b),
    "ij,kj->ik": error(np.einsum("ij,kj->ik", a, transposed)),
    "ij,jk->ik": error(np.einsum("ij,jk->ik", a, b)),
    "ij,jk->ik, optimized": error(np.einsum("ij,jk->ik", a, b, optimize=True)),
}
for way, found in errors.items():
    print(f"{way}: relative error {found:.1e}")
ratio = float((np.einsum("ij,jk->ik", a, b).astype(np.float64) / exact).mean())
print(f"mean of the einsum divided by the exact product: {ratio:.3f}")
worst = errors.pop("ij,jk->ik")
assert max(errors.values()) < 5e-4 and worst > 0.03
assert ratio < 0.97
EOF_PYTHON
