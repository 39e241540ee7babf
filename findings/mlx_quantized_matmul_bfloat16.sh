#!/usr/bin/env bash
# mlx 0.32.4: on a CPU in bfloat16, quantized_matmul errs by 6 %, and matmul of the same weights by 0.2 %.
#
# quantized_matmul multiplies by the weights that dequantize gives, and one would expect the result to be that
# of the two steps, up to a rounding: mx.matmul of bfloat16 adds up in float32 and rounds once.
# quantized_matmul on the CPU adds up in bfloat16, product by product. At width 4096 that costs 6 % of the
# output for normally distributed numbers, and 75 % for positive ones, as a sum of 256 times its terms stops
# growing. In float32 both agree.
#
# It matters to those who check a quantized model or the export to MLX on Linux, as in CI: with bfloat16, the
# usual dtype, the model looks broken by its quantization, and the error grows with the width. Float32
# activations and scales, or dequantize and matmul, avoid it.
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


def wide(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


draw = np.random.default_rng(0)
for kind, make in (("positive", draw.random), ("normal", draw.standard_normal)):
    for width in (256, 4096):
        values, inputs = make((64, width)), make((4, width))
        for dtype in (mx.float32, mx.bfloat16):
            weights = mx.quantize(mx.array(values).astype(dtype), group_size=64, bits=4)
            x = mx.array(inputs).astype(dtype)
            dense = mx.dequantize(*weights, group_size=64, bits=4)
            assert dense.dtype == dtype
            exact = wide(x) @ wide(dense).T
            direct = mx.quantized_matmul(x, *weights, transpose=True, group_size=64, bits=4)
            products = (x @ dense.T, direct)
            errors = [float(np.linalg.norm(wide(y) - exact) / np.linalg.norm(exact)) for y in products]
            print(f"{kind}, width {width}, {dtype}: matmul {errors[0]:.1e}, quantized_matmul {errors[1]:.1e}")
            if dtype == mx.float32:
                assert max(errors) < 1e-5
            else:
                assert errors[0] < 4e-3
                assert errors[1] > {256: 4, 4096: 15}[width] * errors[0]
EOF_PYTHON
