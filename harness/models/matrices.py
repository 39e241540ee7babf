"""Which parameters of a decoder layer are ternarized, which stay as they are, and which are not understood.

Ternarized are nn.Linear, and transformers' Conv1D and fused experts, which `harness.models.linearize` turns
into nn.Linear. Left as they are: embeddings, convolutions, vectors, what `KEPT` names, and matrices with
fewer than `SMALL` rows or columns; together they are few weights, and a model is sensitive to them. All other
parameters are not understood: they stay as they are too, as do matrices that several layers share, and a run
says so.
"""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.conv import _ConvNd

# A matrix with fewer rows or columns is left as it is: gates of single heads, low ranks.
SMALL = 32

# Parameters that are left as they are, by a part of their name in the layer.
KEPT = {
    "routers and gates": r"(.*_)?router(_.*)?|gate|shared_expert_gate|forget_gate|[if]gate_preact",
    "what chooses the tokens of sparse attention": r"indexer|scorer",
    "cross-attention, which reads no text": r"encoder_attn|cross_?attn|crossattention",
    "state-space parameters": r"A_log|D|(x|dt)_proj(_weight)?|in_proj_(a|b|ba)|[ab]_proj|\w+_gate_weight",
}
_KEPT = re.compile("|".join(KEPT.values()))

# The same, by the class of the module that holds them.
ROUTERS = re.compile(r"\w+(Router|Gate)")

# Subclasses of nn.Linear whose own forward computes the same product.
SAME_PRODUCT = ("FalconLinear",)


def is_kept(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter of this name in its layer, and of this shape, is left as it is."""
    sides = [size for size in shape if size > 1]
    few = len(sides) < 2 or (len(sides) == 2 and min(sides) < SMALL)
    return few or any(_KEPT.fullmatch(part) for part in name.split("."))


def ternarized(layer: nn.Module) -> dict[str, nn.Linear]:
    """Return the modules of a layer that are ternarized, by their names in the layer."""
    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and _multiplies(module) and not is_kept(name, module.weight.shape)
    }


def not_understood(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a layer that are not understood, by their names in the layer."""
    found = {}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Embedding | _ConvNd) or ROUTERS.fullmatch(type(module).__name__):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}" if name else key
            if isinstance(module, nn.Linear) and _multiplies(module):
                continue
            if not is_kept(full, parameter.shape):
                found[full] = parameter
    return found


def _multiplies(linear: nn.Linear) -> bool:
    """Whether a linear layer computes what nn.Linear does."""
    return type(linear).forward is nn.Linear.forward or type(linear).__name__ in SAME_PRODUCT
