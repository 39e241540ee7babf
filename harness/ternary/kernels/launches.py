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
from reference.layout import PARTS
from reference.types import CodedGrid

# Of checkpoints that do not say which layers read one input: projections that models call one after the other
# with the same tensor. Where a model does not, outputs are right all the same, and computed more than once.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
OTHER_INPUTS = {"key_value_states", "cross_attention_states", "encoder_hidden_states"}


def use_kernels(
    model: nn.Module, shared_inputs: list[list[str]] | None = None, backend: Backend | None = None
) -> None:
    """Let every `TernaryLinear` of a model multiply by packed trits.

    Parameters
    ----------
    model : nn.Module
        The model.
    shared_inputs : list of lists of str, optional
        Names of layers that read one and the same input; they share a launch. Guessed from the names if
        left out.
    backend : Backend, optional
        Runs the kernels; gpu if left out.

    Raises
    ------
    UserError
        If the GPU backend cannot run.
    """
    backend = backend or load_backend("gpu")
    share_memory(backend)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TernaryLinear)}
    groups = _guessed_groups(model) if shared_inputs is None else shared_inputs
    for names in launches(layers, groups):
        share_launch([layers[name] for name in names], backend)


def launches(layers: dict[str, TernaryLinear], groups: list[list[str]]) -> list[list[str]]:
    """Every layer once, in groups that one launch can take.

    Parameters
    ----------
    layers : dict of str to TernaryLinear
        The layers of a model.
    groups : list of lists of str
        Names of layers that read one input; a layer may be in none.
    """
    alike: dict[tuple[Any, ...], list[str]] = {}
    group_of = {name: number for number, group in enumerate(groups) for name in group}
    for name, layer in layers.items():
        kind = (layer.in_features, layer.block_size, layer.row_factor is None)
        alike.setdefault((group_of.get(name, name), *kind), []).append(name)
    return [names[i : i + PARTS] for names in alike.values() for i in range(0, len(names), PARTS)]


def _guessed_groups(model: nn.Module) -> list[list[str]]:
    """Groups of layers that read one input, guessed from the names they have in their module."""
    groups = []
    for prefix, parent in model.named_modules():
        # Attention to something else has two inputs.
        if OTHER_INPUTS & inspect.signature(parent.forward).parameters.keys():
            continue
        children = {name for name, child in parent.named_children() if isinstance(child, TernaryLinear)}
        groups += [
            [f"{prefix}.{name}" if prefix else name for name in names]
            for names in SHARED_INPUTS
            if children.issuperset(names)
        ]
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
    from gpu.kernels.layout import can_be_tiled
    from gpu.layout import join  # needs CuPy and a device

    if not can_be_tiled(layers[0].block_size):
        return
    first = next(layers[0].buffers())
    # The backend works on the current device, whichever the layers are on, and on torch's stream there.
    with torch.cuda.device_of(first), Compute(first.device).queue(backend):
        layouts = [_lay_out(layer, backend) for layer in layers]
        packed = PackedWeights(join(layouts))
    for part, layer in enumerate(layers):
        layer.use_kernels(packed, part)


def _lay_out(layer: TernaryLinear, backend: Backend) -> Any:
    from gpu.layout import lay_out

    stored = {name: backend.to_device(tensor) for name, tensor in layer.stored().items()}
    scale, shift = stored["scale"], stored["shift"]
    if "row_factor" in stored:
        row = stored["row_factor"][:, None]
        scale = CodedGrid(scale, row, stored["scale_factor"][None])
        shift = CodedGrid(shift, row, stored["shift_factor"][None])
    order = stored.get("permutation")
    if order is None:
        order = backend.to_device(torch.arange(layer.in_features, device=layer.device))
    return lay_out(stored["trits"], scale, shift, order, layer.block_size)
