#!/usr/bin/env bash
# safetensors 0.8.0 saves a transposed NumPy array with its numbers in the wrong places.
#
# One would expect load(save({"w": w.T})) to be w.T, as in 0.7.0, or an error, as safetensors.torch
# raises one. safetensors.numpy passes on the shape and a pointer to the memory and ignores strides, so
# w.T is stored as the rows of w cut to another length. The documentation asks for contiguous arrays;
# NumPy calls w.T "F_CONTIGUOUS", and nothing is checked. Shape, dtype and sum are right (known upstream
# as issue 825).
#
# It matters to those who write weights from NumPy or SciPy: .T, np.asfortranarray and much of
# scipy.linalg return such arrays. np.ascontiguousarray before saving avoids it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH

cat > roundtrip.py <<'EOF_PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, save

saved = np.arange(6.0).reshape(2, 3).T
loaded = load(save({"w": saved}))["w"]
kept = bool(np.array_equal(loaded, saved))
print(f"safetensors {safetensors.__version__}: saved {saved.tolist()}, loaded {loaded.tolist()}, equal: {kept}")
assert np.array_equal(load(save({"w": np.ascontiguousarray(saved)}))["w"], saved)
assert loaded.shape == saved.shape
assert kept == (sys.argv[1] == "kept")
EOF_PYTHON

python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check safetensors==0.7.0 numpy==2.4.6
env/bin/python roundtrip.py kept
env/bin/pip install --quiet --no-compile --disable-pip-version-check safetensors==0.8.0
env/bin/python roundtrip.py scrambled
