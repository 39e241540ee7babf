"""Products of the experts of a layer, each with tokens of its own: small ones, and many of them."""

from __future__ import annotations

import torch
from torch import nn

from harness.models.experts import one_by_one
from harness.ternary.kernels.host import multiply_each
from harness.ternary.kernels.operation import has_kernel_on_host
from harness.ternary.linear import TernaryLinear


def together(matrices: list[nn.Module], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Multiply by packed trits on a CPU in one go, with threads sharing the matrices; else one by one.

    Parameters
    ----------
    matrices : list of nn.Module
        Matrices of one kind, in TernaryLinear layers or others.
    inputs : list of (tokens, m) tensor
        What each multiplies.

    Returns
    -------
    list of (tokens, n) tensor
        The same bits as of one product after the other.
    """
    layers, factors = [], []
    for layer, x in zip(matrices, inputs, strict=True):
        if not isinstance(layer, TernaryLinear) or layer.packed is None or _is_watched(layer, x):
            return one_by_one(matrices, inputs)
        packed = layer.packed.tensors()
        if len(packed.ends) > 1 or not has_kernel_on_host(packed, x):
            return one_by_one(matrices, inputs)
        layers.append(layer)
        factors.append((x, packed))
    return [
        y if layer.bias is None else y + layer.bias.to(y.dtype)
        for layer, y in zip(layers, multiply_each(factors), strict=True)
    ]


def _is_watched(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether a product must go through the layer's own call: for hooks, gradients or compilation."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return bool(hooks) or torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled())
