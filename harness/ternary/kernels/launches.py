"""Let the layers of a loaded model multiply by packed trits, those with one input in one launch."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from harness.backends import Backend, load_backend
from harness.compute import Compute, share_memory
from harness.ternary.kernels.shared import PackedWeights
from harness.ternary.linear import TernaryLinear
from reference.types import CodedGrid

# Projections that models call one after the other with the same tensor. Where a model does not, their
# outputs are right all the same, and computed more than once.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


OTHER_INPUTS = {"key_value_states", "cross_attention_states", "encoder_hidden_states"}


def use_kernels(model: nn.Module, backend: Backend | None = None) -> None:
    """Let every `TernaryLinear` of a model multiply by packed trits; `backend` is gpu if left out.

    Layers that are given the same input share a launch.

    Raises
    ------
    UserError
        If the GPU backend cannot run.
    """
    backend = backend or load_backend("gpu")
    share_memory(backend)
    for layers in _launches(model):
        share_launch(layers, backend)


def _launches(model: nn.Module) -> list[list[TernaryLinear]]:
    """The ternary layers of a model, in groups that are given the same input and can share a launch."""
    groups = []
    for parent in model.modules():
        children = {
            name: child for name, child in parent.named_children() if isinstance(child, TernaryLinear)
        }
        # Attention to something else has two inputs.
        crossed = OTHER_INPUTS & inspect.signature(parent.forward).parameters.keys()
        for names in () if crossed else SHARED_INPUTS:
            found = [children[name] for name in names if name in children]
            kinds = {(layer.in_features, layer.block_size, layer.row_factor is None) for layer in found}
            if len(found) == len(names) and len(kinds) == 1:
                groups.append(found)
                children = {name: child for name, child in children.items() if name not in names}
        groups += [[child] for child in children.values()]
    return groups


def share_launch(layers: list[TernaryLinear], backend: Backend) -> None:
    """Let layers that are given the same input multiply by packed trits, in one launch.

    Layers whose blocks no fast kernel takes are left as they are.

    Parameters
    ----------
    layers : list of TernaryLinear
        At most three, of the same columns, block size and kind of grid.
    backend : Backend
        Lays them out.
    """
    if not backend.function("kernels.layout.can_be_tiled")(layers[0].block_size):
        return
    first = next(layers[0].buffers())
    # The backend works on the current device, whichever the layers are on, and on torch's stream there.
    with torch.cuda.device_of(first), Compute(first.device).queue(backend):
        layouts = [_lay_out(layer, backend) for layer in layers]
        packed = PackedWeights(backend.function("matmul.join")(layouts))
    for part, layer in enumerate(layers):
        layer.use_kernels(packed, part)


def _lay_out(layer: TernaryLinear, backend: Backend) -> Any:
    stored = {name: backend.to_device(tensor) for name, tensor in layer.stored().items()}
    scale, shift = stored["scale"], stored["shift"]
    if "row_factor" in stored:
        row = stored["row_factor"][:, None]
        scale = CodedGrid(scale, row, stored["scale_factor"][None])
        shift = CodedGrid(shift, row, stored["shift_factor"][None])
    order = stored.get("permutation")
    if order is None:
        order = backend.to_device(torch.arange(layer.in_features, device=layer.device))
    return backend.function("matmul.lay_out")(stored["trits"], scale, shift, order, layer.block_size)
