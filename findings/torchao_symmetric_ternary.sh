#!/usr/bin/env bash
# torchao 0.18.0, compressed-tensors 0.20.1: by default 1 and -1 become 0.67 and -1.33 at 2 bits.
#
# IntxWeightOnlyConfig of torchao and QuantizationArgs of compressed-tensors are symmetric by default. One
# would expect that to keep the largest magnitude of a group, as max|w| / (2^(bits-1) - 1) would, and to treat
# w and -w alike. Both divide max|w| by (2^bits - 1) / 2 instead. So the largest weight lies halfway between
# two levels, always: on 1.5 at 2 bits, on 7.5 at 4. Of the two, the one further from 0 exists for negative
# weights only. For weights of -1, 0 and 1, which two bits can hold, 1 comes back as 0.67, and -1 as -1.33, or
# as -0.67 where the division rounds down. At 4 bits the largest weight changes by 7 %. Errors do not cancel:
# the sum of a matrix of random weights falls. MappingType.SYMMETRIC_NO_CLIPPING_ERR of torchao keeps the
# largest weight, which for random weights at 2 bits costs more than it gains.
#
# It matters to those who store a ternary model by these libraries: a negative weight gets twice the size of a
# positive one. A scale of their own, or that type of mapping, stores it without an error.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check compressed-tensors==0.20.1 numpy==2.4.6 torch==2.13.0 torchao==0.18.0 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
from importlib.metadata import version

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
from torchao.quantization.granularity import PerGroup

GROUP = 32


def torchao(weights, bits, **mapping):
    """Weights as torchao gives them back."""
    model = torch.nn.Sequential(torch.nn.Linear(weights.shape[1], weights.shape[0], bias=False))
    model[0].weight.data = weights.clone()
    dtype = getattr(torch, f"int{bits}")
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerGroup(GROUP), **mapping))
    return model[0].weight.dequantize()


def compressed_tensors(weights, bits, scale=None):
    """Weights as compressed-tensors gives them back."""
    args = QuantizationArgs(num_bits=bits, strategy="group", group_size=GROUP)
    groups = weights.view(len(weights), -1, GROUP)
    usual, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    return fake_quantize(weights, usual if scale is None else torch.full_like(usual, scale), zero, args)


print(*(f"{name} {version(name)}" for name in ("torchao", "compressed-tensors", "torch")))
assert IntxWeightOnlyConfig().mapping_type is MappingType.SYMMETRIC and QuantizationArgs().symmetric
torch.manual_seed(0)
ternary = torch.randint(-1, 2, (8, 64)).float()
dense = torch.randn(256, 256)
largest = dense.view(-1, GROUP).abs().argmax(1, keepdim=True)
for library in (torchao, compressed_tensors):
    values = [round(value, 3) for value in library(ternary, 2).unique().tolist()]
    print(f"{library.__name__}, 2 bits, weights of -1, 0, 1: {values}")
    assert values == [-1.333, 0.0, 0.667]
    scales = torch.rand(100).tolist()
    below = {round(float((library(scale * ternary, 2) / scale).min()), 2) for scale in scales}
    above = {round(float((library(scale * ternary, 2) / scale).max()), 2) for scale in scales}
    print(f"  times {len(scales)} scales: -1 becomes {sorted(below)}, 1 becomes {sorted(above)}")
    assert above == {0.67} and -1.33 in below and below <= {-1.33, -0.67}
    for bits, kept in ((2, {0.667, 1.333}), (4, {0.933, 1.067})):
        found = library(dense, bits)
        ratio = (found.view(-1, GROUP) / dense.view(-1, GROUP)).gather(1, largest)
        ratios = {round(value, 3) for value in ratio.flatten().tolist()}
        print(f"  {bits} bits, random weights: the largest of a group times {sorted(ratios)}", end="")
        print(f", sum of all weights {dense.sum():.0f} -> {found.sum():.0f}")
        assert ratios <= kept and min(kept) in ratios and found.sum() < dense.sum() - 100

no_clipping = {"mapping_type": MappingType.SYMMETRIC_NO_CLIPPING_ERR}
assert torch.equal(torchao(ternary, 2, **no_clipping), ternary)
assert torch.equal(compressed_tensors(ternary, 2, scale=1.0), ternary)
print("exact: torchao with SYMMETRIC_NO_CLIPPING_ERR, compressed_tensors with a scale of 1")
usual, other = ((torchao(dense, 2, **kind) - dense).square().mean() for kind in ({}, no_clipping))
print(f"mean squared error of torchao at 2 bits, random weights: {usual:.3f}; without clipping {other:.3f}")
assert usual < other
EOF_PYTHON
