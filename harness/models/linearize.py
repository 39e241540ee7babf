"""Rewrite decoder layers so that every matrix to ternarize is an nn.Linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.models.decoder import Reader, locate_layers
from harness.models.experts import DOWN, Experts, separated, up_name
from harness.models.matrices import is_kept


@dataclass(frozen=True)
class Source:
    """Where the files have a tensor of a rewritten layer: its name there, and whether it is transposed or
    one of several."""

    name: str
    transposed: bool = False
    expert: int | None = None

    def take(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Take the tensor from those of the files."""
        tensor = tensors[self.name]
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor.T if self.transposed else tensor


def linearize(model: nn.Module, read: Reader | None = None) -> Reader | None:
    """Turn Conv1D and fused experts in the decoder layers into nn.Linear, in place, with shared weights.

    Parameters
    ----------
    model : nn.Module
        A causal language model.
    read : callable, optional
        Reads tensors of the layers from disk, if the layers are on torch's meta device.

    Returns
    -------
    callable or None
        `read` by the names that the rewritten layers have.
    """
    decoder = locate_layers(model)
    sources: dict[str, Source] = {}
    for index, layer in enumerate(decoder.layers):
        for name, module in list(layer.named_modules()):
            if isinstance(module, Conv1D) and not is_kept(name, module.weight.shape):
                put(layer, name, _as_linear(module))
                weight = f"{decoder.full_name(index, name)}.weight"
                sources[weight] = Source(weight, transposed=True)
            elif (kind := separated(module)) and _is_ternarized(name, module):
                experts = kind(module)
                experts.every = True
                put(layer, name, experts)
                sources |= _sources(decoder.full_name(index, name), experts)
    if read is None or not sources:
        return read

    def read_rewritten(names: list[str]) -> dict[str, torch.Tensor]:
        places = {name: sources.get(name, Source(name)) for name in names}
        found = read(sorted({place.name for place in places.values()}))
        return {name: place.take(found) for name, place in places.items()}

    return read_rewritten


def put(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one that has this name in its parent."""
    outer, _, own = name.rpartition(".")
    setattr(parent.get_submodule(outer), own, module)


def _is_ternarized(name: str, fused: nn.Module) -> bool:
    """Whether all matrices of fused experts are to be ternarized."""
    parts = (up_name(fused), DOWN)
    return not any(is_kept(f"{name}.{part}", getattr(fused, part).shape[1:]) for part in parts)


def _sources(name: str, experts: Experts) -> dict[str, Source]:
    """Places of the experts' tensors in the files, if those hold them fused."""
    sources = {}
    for part in (up_name(experts), DOWN):
        for number in range(experts.num_experts):
            own = f"{name}.{number}.{part}"
            sources[f"{own}.weight"] = Source(f"{name}.{part}", experts.is_transposed, number)
            sources[f"{own}.bias"] = Source(f"{name}.{part}_bias", expert=number)
    return sources


def _as_linear(module: Conv1D) -> nn.Linear:
    linear = nn.Linear(module.nx, module.nf, device="meta")
    linear.weight = nn.Parameter(module.weight.detach().T, requires_grad=False)
    linear.bias = module.bias
    return linear.train(module.training)
