#!/usr/bin/env bash
# torch 2.13.0: cast to float8_e4m3fn, infinity becomes 448; other float8 types give infinity or NaN.
#
# PyTorch's other casts to a narrower float turn what is too large into infinity, or into NaN where the type
# has no infinity, so that a check for finite numbers finds an overflow. One would expect that of float8 as
# well. float8_e5m2 gives infinity, and float8_e4m3fnuz, float8_e5m2fnuz and float8_e8m0fnu give NaN. But
# float8_e4m3fn, which is the one used for weights and activations, takes any larger number, and infinity too,
# for its largest, 448; only NaN stays NaN.
#
# It matters to those who cast with a scale that is too small, or cast activations that have overflowed
# already: every number is finite afterwards, and the model is only worse. Code that clips before it casts is
# safe in all five types, but an isfinite check has to be made before the cast.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check numpy==2.4.6 torch==2.13.0

env/bin/python - <<'EOF_PYTHON'
from importlib.metadata import version

import torch

print("torch", version("torch"))
infinity, nan = float("inf"), float("nan")
expected = {
    torch.float8_e4m3fn: [448.0, 448.0, 448.0, nan],
    torch.float8_e5m2: [448.0, infinity, infinity, nan],
    torch.float8_e4m3fnuz: [nan, nan, nan, nan],
    torch.float8_e5m2fnuz: [448.0, nan, nan, nan],
    torch.float8_e8m0fnu: [512.0, 1048576.0, nan, nan],
}
for kind, values in expected.items():
    for source in (torch.float64, torch.float32, torch.bfloat16):
        for repeat in (1, 100):
            wide = torch.tensor([464.0, 1e6, infinity, nan] * repeat, dtype=source)
            narrow = wide.to(kind).float().tolist()
            assert str(narrow) == str(values * repeat), (kind, source, narrow)  # as text: NaN is not NaN
    print(f"464, 1e6, infinity and NaN to {kind} (largest {torch.finfo(kind).max:g}): {values}")
half = torch.tensor([464.0, 1e6, infinity, nan]).to(torch.float16).tolist()
print("to torch.float16:", half)
assert str(half) == str([464.0, infinity, infinity, nan])
EOF_PYTHON
