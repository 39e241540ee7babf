"""Random ternary layers without dense weights, and how far their products may be off."""

import torch

from harness.comparison.speed import fill
from harness.ternary.linear import TernaryLinear

# Of the largest output: products and sums of the dense weights, rounded to this type, against exact ones.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def layer_of(rows, columns, block_size, device, permuted=True, bias=False, grid="float16", symmetric=False):
    torch.manual_seed(rows)
    layer = TernaryLinear(columns, rows, block_size, grid, permuted, bias, torch.float32, symmetric)
    layer = layer.to(device)
    if grid == "int8":
        for codes in (layer.scale,) if symmetric else (layer.scale, layer.shift):
            codes.random_(-127, 128)
        for factor in (layer.row_factor, layer.scale_factor, layer.shift_factor):
            if factor is not None:
                factor.uniform_(0.01, 0.1)
        other = TernaryLinear(columns, rows, block_size, "float16", permuted, bias, torch.float32).to(device)
        fill(other)
        layer.trits.copy_(other.trits)
        layer.permutation.copy_(other.permutation)
    else:
        fill(layer)
        layer.scale.mul_(torch.randn(layer.scale.shape, device=device).half())
    layer.keep_dense(False)
    if bias:
        layer.bias.data.normal_()
    return layer


def off(y, expected):
    """The largest error, as a share of the largest output."""
    return (y.double() - expected.double()).abs().max() / expected.abs().max()
