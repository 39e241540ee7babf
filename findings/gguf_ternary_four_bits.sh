#!/usr/bin/env bash
# gguf 0.19.0: four, five or eight bits a weight do not hold ternary weights, where two bits do.
#
# Weights that are all -1, 0 or 1 have three values, and a block of Q4_0 has a scale and 16 levels. One
# would expect to get the weights back exactly: scale 1 and the levels 7, 8, 9 are such a block, as
# the script shows. But gguf.quants.quantize looks at the largest weight alone and puts it on the
# lowest level, -8. The opposite sign would need +8, is cut off at +7 and comes back as 0.875. Q5_0 does
# the same, Q4_1 and Q5_1 have no level at 0, and Q8_0 rounds 1/127 to fp16. TQ1_0 and TQ2_0 are exact.
#
# It matters to those who store a ternary model in a common type because a runtime has kernels for it:
# half of the nonzero weights shrink by an eighth although a block without any error exists.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check gguf==0.19.0 numpy==2.4.6

env/bin/python - <<'EOF_PYTHON'
from importlib.metadata import version

import numpy as np
from gguf import GGMLQuantizationType, quants

print("gguf", version("gguf"))
weights = np.tile(np.array([1, 0, -1, 0], np.float32), 64)[np.newaxis]
error = {}
for name in ("TQ1_0", "TQ2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
    kind = GGMLQuantizationType[name]
    packed = quants.quantize(weights, kind)
    values = quants.dequantize(packed, kind)
    error[name] = float(np.abs(values - weights).max())
    print(f"{name}: {8 * packed.nbytes / weights.size:.4g} bits a weight, values {np.unique(values)}")

# A block of Q4_0 by hand: scale 1 in fp16, then weight i in the low and weight 16 + i in the high half of byte i.
block = weights[0, :32]
levels = (block + 8).astype(np.uint8)
by_hand = np.concatenate([np.ones(1, np.float16).view(np.uint8), levels[:16] | levels[16:] << 4])
exact = quants.dequantize(by_hand[np.newaxis], GGMLQuantizationType.Q4_0)
print("Q4_0 by hand: values", np.unique(exact))
assert np.array_equal(exact[0], block)
assert error["TQ1_0"] == error["TQ2_0"] == 0
assert error["Q4_0"] == 1 / 8 and error["Q5_0"] == 1 / 16
assert error["Q4_1"] > 0.06 and error["Q5_1"] > 0.03 and 0 < error["Q8_0"] < 1e-3
EOF_PYTHON
