#!/usr/bin/env bash
# mlx 0.32.4: the Cholesky factor of a matrix that is not positive definite is finite, real and no factor.
#
# A matrix with a negative eigenvalue has no Cholesky factor, and one would expect an error, as NumPy and
# PyTorch raise one, or NaN. LAPACK stops at the first pivot that is not positive, says so in its return code,
# and leaves the rest of the matrix as far as it came. mx.linalg.cholesky on the CPU does not look at that
# code and gives the half-finished matrix, with the negative pivot on its diagonal. cholesky_inv of it is
# finite as well. mx.linalg.inv does look, and raises for a singular matrix.
#
# It matters to those who bring GPTQ or another method with a Hessian to MLX: too little damping shows itself
# as a failed factorization elsewhere, and here as poor weights. A diagonal that is not all positive shows it,
# or the product of the factor with its transpose.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check "mlx[cpu]==0.32.4" numpy==2.4.6

env/bin/python - <<'EOF_PYTHON'
from importlib.metadata import version

import mlx.core as mx
import numpy as np

print("mlx", version("mlx"), "numpy", version("numpy"))
mx.set_default_device(mx.cpu)
draw = np.random.default_rng(0)
inputs = draw.normal(size=(64, 8)).astype(np.float32)
definite = inputs.T @ inputs / 64
eigenvalues, vectors = np.linalg.eigh(definite)
eigenvalues[0] = -0.1
indefinite = (vectors * eigenvalues) @ vectors.T
small = np.array([[1, 2], [2, 1]], np.float32)


def refused(matrix):
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return True
    return False


for name, matrix in (("definite", definite), ("indefinite", indefinite), ("[[1, 2], [2, 1]]", small)):
    factor = np.array(mx.linalg.cholesky(mx.array(matrix)))
    inverse = np.array(mx.linalg.cholesky_inv(mx.array(factor)))
    error = float(np.abs(factor @ factor.T - matrix).max())
    print(
        f"{name}: NumPy refuses {refused(matrix)}, MLX has {factor.diagonal().round(2)} on its diagonal and "
        f"misses the matrix by {error:.1g}"
    )
    assert np.isfinite(factor).all() and np.isfinite(inverse).all()
    assert refused(matrix) == (name != "definite") == bool((factor.diagonal() <= 0).any())
    assert (error < 1e-5) if name == "definite" else (error > 0.05)
assert factor.tolist() == [[1, 0], [2, -3]]
try:
    mx.eval(mx.linalg.inv(mx.array([[1.0, 1.0], [1.0, 1.0]])))
except RuntimeError as error:
    print("inv of a singular matrix:", error)
else:
    raise SystemExit("inv of a singular matrix raises nothing")
EOF_PYTHON
