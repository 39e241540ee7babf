"""Make the layers of a loaded model multiply by packed trits; layers with the same input share a launch."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from harness.backends import Backend, load_backend
from harness.compute import Compute, share_memory
from harness.ternary.kernels.host import lay_out
from harness.ternary.kernels.shared import PackedWeights
from harness.ternary.kernels.tensors import Matrix, of_layout
from harness.ternary.linear import TernaryLinear
from reference.layout import PARTS
from reference.types import CodedGrid

# For checkpoints without `shared_inputs`: projections that models usually call in turn on the same tensor. If
# a model does not, its outputs are still correct, but computed more than once.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
OTHER_INPUTS = {"key_value_states", "cross_attention_states", "encoder_hidden_states"}


def use_kernels(
    model: nn.Module, shared_inputs: list[list[str]] | None = None, backend: Backend | None = None
) -> None:
    """Make every `TernaryLinear` of a model multiply by packed trits.

    Parameters
    ----------
    model : nn.Module
        The model.
    shared_inputs : list of lists of str, optional
        Names of layers that read the same input and share a launch. By default, those stored in the
        model's configuration; if it has none, guessed from the names.
    backend : Backend, optional
        Lays the matrices out on its device. By default gpu; for layers on a CPU, none is needed.

    Raises
    ------
    UserError
        If the GPU backend cannot run.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TernaryLinear)}
    if backend is None and any(layer.device.type != "cpu" for layer in layers.values()):
        backend = load_backend("gpu")
    if backend is not None:
        share_memory(backend)
    if shared_inputs is None:
        stored = getattr(getattr(model, "config", None), "quantization_config", None)
        shared_inputs = getattr(stored, "shared_inputs", None)
    groups = _guessed_groups(model) if shared_inputs is None else shared_inputs
    for names in launches(layers, groups):
        members = [layers[name] for name in names]
        if backend is None:
            share_on_host(members)
        else:
            share_launch(members, backend)


def launches(layers: dict[str, TernaryLinear], groups: list[list[str]]) -> list[list[str]]:
    """Split all layers into groups that one launch can compute; each layer is in one group.

    Parameters
    ----------
    layers : dict of str to TernaryLinear
        The layers of a model.
    groups : list of lists of str
        Names of layers that read the same input; a layer may be in none.
    """
    alike: dict[tuple[Any, ...], list[str]] = {}
    group_of = {name: number for number, group in enumerate(groups) for name in group}
    for name, layer in layers.items():
        kind = (layer.in_features, layer.block_size, layer.row_factor is None, layer.symmetric)
        alike.setdefault((group_of.get(name, name), *kind), []).append(name)
    return [names[i : i + PARTS] for names in alike.values() for i in range(0, len(names), PARTS)]


def _guessed_groups(model: nn.Module) -> list[list[str]]:
    """Guess from their names which layers of a module read the same input."""
    groups = []
    for prefix, parent in model.named_modules():
        # In cross-attention, q reads another input than k and v.
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
    """Make layers with the same input multiply by packed trits, in one launch.

    Layers with a block size that no fast kernel supports are left unchanged.

    Parameters
    ----------
    layers : list of TernaryLinear
        At most three, with the same number of columns, block size and type of grid.
    backend : Backend
        Converts them to the kernels' layout.
    """
    from gpu.kernels.layout import can_be_tiled  # needs CuPy and a device

    if not can_be_tiled(layers[0].block_size):
        return
    first = next(layers[0].buffers())
    # The backend works on the current device, so make it the layers' device, and use torch's stream.
    with torch.cuda.device_of(first), Compute(first.device).queue(backend):
        layouts = [_lay_out(layer, backend) for layer in layers]
        packed = PackedWeights(of_layout(backend.function("layout.join")(layouts)))
    for part, layer in enumerate(layers):
        layer.use_kernels(packed, part)


def share_on_host(layers: list[TernaryLinear]) -> None:
    """Make layers on a CPU, with the same input, multiply by packed trits; in one product if they can.

    Parameters
    ----------
    layers : list of TernaryLinear
        With the same number of columns, block size and type of grid. Those with other permutations multiply
        on their own.
    """
    alike: list[list[tuple[TernaryLinear, Matrix]]] = []
    for layer in layers:
        matrix = layer.matrix()
        for group in alike:
            if torch.equal(group[0][1].permutation.long(), matrix.permutation.long()):
                group.append((layer, matrix))
                break
        else:
            alike.append([(layer, matrix)])
    for group in alike:
        packed = PackedWeights(lay_out([matrix for _, matrix in group], layers[0].block_size))
        for part, (layer, _) in enumerate(group):
            layer.use_kernels(packed, part)


def _lay_out(layer: TernaryLinear, backend: Backend) -> Any:
    tensors = layer.stored()
    if layer.symmetric:  # the layout has a place for mu in any case
        parts = {"scale": "shift", "scale_factor": "shift_factor"}
        tensors |= {parts[name]: torch.zeros_like(tensors[name]) for name in parts.keys() & tensors.keys()}
    stored = {name: backend.to_device(tensor) for name, tensor in tensors.items()}
    scale, shift = stored["scale"], stored["shift"]
    if "row_factor" in stored:
        row = stored["row_factor"][:, None]
        scale = CodedGrid(scale, row, stored["scale_factor"][None])
        shift = CodedGrid(shift, row, stored["shift_factor"][None])
    order = stored.get("permutation")
    if order is None:
        order = backend.to_device(torch.arange(layer.in_features, device=layer.device))
    lay_out = backend.function("layout.lay_out")
    return lay_out(stored["trits"], scale, shift, order, layer.block_size)
