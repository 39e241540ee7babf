#!/usr/bin/env bash
# mlx 0.32.4: quantize at 2 bits halves the negative weights of a ternary matrix.
#
# One would expect the largest and the smallest weight of a group to be kept at any number of bits: the
# documentation gives the step as (max - min) / (2^bits - 1), with level 0 at min. For -1, 0 and 1 two bits even
# hold all: step 1 from -1, as the script shows. But quantize then changes the step so that 0 is a level, keeps
# the end of larger magnitude and cuts off the other one. In a group from -1 to 1 at 2 bits the levels
# are 1, 0.5, 0, -0.5, and -1 comes back as -0.5. More bits err less, but not always: at 5 bits -1 becomes
# -0.94, while 3 and 4 bits are exact here. For other scales of the same weights these err as well.
#
# It matters to those who bring a ternary or other 2-bit model to MLX: half of the nonzero weights lose
# half of their size, in a format that could hold them. Writing scales, biases and levels by hand
# avoids it.
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

mx.set_default_device(mx.cpu)
print("mlx", version("mlx"))
GROUP = 64
ternary = np.tile(np.array([1, 0, -1, 0], np.float32), GROUP)[np.newaxis]


def back(weights, bits):
    packed, scales, biases = mx.quantize(mx.array(weights), group_size=GROUP, bits=bits)
    return np.array(mx.dequantize(packed, scales, biases, group_size=GROUP, bits=bits))


error = {}
for bits in (2, 3, 4, 5, 6, 8):
    values = back(ternary, bits)
    error[bits] = float(np.abs(values - ternary).max())
    # The same weights with 100 scales, as a real matrix has one a group or row.
    others = [float(np.abs(back(ternary * s, bits) - ternary * s).max() / s) for s in np.linspace(0.01, 0.1, 100)]
    print(f"{bits} bits: values {np.unique(values)}, largest error at 100 other scales {max(others):.2g} of the scale")

# By hand: 16 levels in a word of 32 bits, the first in the lowest bits; weight = scale * level + bias.
levels = (ternary + 1).astype(np.uint32).reshape(1, -1, 16)
words = (levels << np.arange(0, 32, 2, dtype=np.uint32)).sum(axis=2, dtype=np.uint32)
ones = mx.ones((1, ternary.size // GROUP))
by_hand = np.array(mx.dequantize(mx.array(words), ones, -ones, group_size=GROUP, bits=2))
print("2 bits by hand: values", np.unique(by_hand))
assert np.array_equal(by_hand, ternary)
assert np.array_equal(np.unique(back(ternary, 2)), [-0.5, 0, 1])
assert error[3] == error[4] == 0 and error[5] == 1 / 16

# Weights of any kind: the documented step keeps both ends of every group.
normal = np.random.default_rng(0).standard_normal((256, GROUP)).astype(np.float32)
values = back(normal, 2)
ends = np.take_along_axis(values - normal, np.stack([normal.argmin(1), normal.argmax(1)], axis=1), axis=1)
print(f"normal weights at 2 bits: an end of a group is off by up to {np.abs(ends).max():.2g}")
assert np.abs(ends).max() > 0.5
EOF_PYTHON
