"""The decoder layers of a model: find their linear layers, and load one decoder layer at a time."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from harness.compute import HOST, Compute
from harness.errors import UserError
from harness.models.matrices import not_understood, ternarized

# How many texts show which layers read text. Images have no axis of this length, as of their three colours.
TEXTS = 5

# Maps tensor names in the whole model to tensors.
Reader = Callable[[list[str]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class DecoderLayers:
    """The decoder layers of a model and the matrices to ternarize in them.

    Attributes
    ----------
    prefix : str
        Module name of the list of layers.
    layers : nn.ModuleList
        The layers, in order.
    linears : list of dict
        For every layer, the nn.Linear modules to ternarize, by their name in the layer. What several layers
        share is not among them: it would have to be fitted to the inputs of all of them.
    read : callable, optional
        Reads tensors from disk by their names in the whole model. If given, `layers` and `linears` are on
        torch's meta device: they have shapes but no weights.
    """

    prefix: str
    layers: nn.ModuleList
    linears: list[dict[str, nn.Linear]]
    read: Reader | None = None
    skipped: tuple[int, ...] = ()

    def without(self, skipped: Sequence[int]) -> DecoderLayers:
        """Return the same layers, with no matrices to ternarize in some of them."""
        linears = [{} if index in skipped else own for index, own in enumerate(self.linears)]
        return replace(self, linears=linears, skipped=tuple(skipped))

    def tensors(self, index: int, names: list[str]) -> dict[str, torch.Tensor]:
        """Get tensors of a layer in the model's dtype, by their names in the layer."""
        state = self.layers[index].state_dict()
        if self.read is None:
            return {name: state[name] for name in names}
        found = self.read([self.full_name(index, name) for name in names])
        return {name: found[self.full_name(index, name)].to(state[name].dtype) for name in names}

    def other_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Tensors of a layer beside its matrices (biases, norms), by their names in the whole model."""
        matrices = {f"{name}.weight" for name in self.linears[index]}
        names = [name for name in self.layers[index].state_dict() if name not in matrices]
        return {self.full_name(index, name): tensor for name, tensor in self.tensors(index, names).items()}

    def working_copy(self, index: int, compute: Compute) -> nn.Module:
        """Copy a layer to the device, in the dtype that layers run in."""
        moved: dict[int, Any] = {}
        if self.read is None:
            # Move matrices straight to the device: a copy on the host first would double the time.
            for linear in self.linears[index].values():
                weight = linear.weight.detach().to(compute.device, compute.dtype)
                moved[id(linear.weight)] = nn.Parameter(weight, requires_grad=False)
        layer = copy.deepcopy(self.layers[index], moved)
        if self.read is not None:
            layer.load_state_dict(self.tensors(index, list(layer.state_dict())), assign=True)
        return layer.to(compute.device, compute.dtype)

    def replace(self, index: int, name: str, weight: torch.Tensor) -> None:
        """Replace the weights of a matrix; does nothing if the layers are on disk."""
        if self.read is None:
            linear = self.linears[index][name]
            linear.weight.data = weight.to(linear.weight.device, linear.weight.dtype)

    @contextmanager
    def outside_on(self, model: nn.Module, device: torch.device) -> Iterator[None]:
        """Move everything outside the decoder layers to a device, and back to the host on exit."""
        inside = {id(tensor) for tensor in (*self.layers.parameters(), *self.layers.buffers())}
        outside = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in inside]
        for tensor in outside:
            tensor.data = tensor.data.to(device)
        try:
            yield
        finally:
            for tensor in outside:
                tensor.data = tensor.data.to(HOST)

    def full_name(self, layer: int, name: str) -> str:
        """Convert a module or tensor name in a layer to its name in the whole model."""
        return f"{self.prefix}.{layer}.{name}"

    def named_linears(self) -> dict[str, nn.Linear]:
        """Every matrix by its name in the whole model."""
        return {
            self.full_name(i, name): linear
            for i, linears in enumerate(self.linears)
            for name, linear in linears.items()
        }

    def not_understood(self) -> dict[str, nn.Parameter]:
        """Parameters that stay as they are because they are not understood, by name in the whole model.

        Matrices that several layers share are among them, those of skipped layers are not.
        """
        found: dict[str, nn.Parameter] = {}
        for i, layer in enumerate(self.layers):
            if i in self.skipped:
                continue
            shared = ternarized(layer).keys() - self.linears[i].keys()
            parts = {f"{name}.weight": layer.get_parameter(f"{name}.weight") for name in sorted(shared)}
            parts |= not_understood(layer)
            found |= {self.full_name(i, name): parameter for name, parameter in parts.items()}
        return found


def as_text(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the arguments with which a model reads (texts, tokens) ids as text, causally.

    PaliGemma reads in both directions whatever its token types do not mark as an answer.
    """
    if getattr(getattr(model, "config", None), "model_type", None) == "paligemma":
        return {"input_ids": ids, "token_type_ids": torch.ones_like(ids)}
    return {"input_ids": ids}


def describe_parameters(model: nn.Module, parameters: dict[str, nn.Parameter]) -> str:
    """List the first few parameters with the class of their module and their shape."""
    described = []
    for name, parameter in list(parameters.items())[:5]:
        kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
        described.append(f"{name} ({kind}, {'x'.join(map(str, parameter.shape))})")
    more = f" and {len(parameters) - 5} more" if len(parameters) > 5 else ""
    return ", ".join(described) + more


def locate_layers(model: nn.Module, read: Reader | None = None) -> DecoderLayers:
    """Find the decoder layers: the ModuleList that text goes through, whatever else a model holds.

    Parameters
    ----------
    model : nn.Module
        A causal language model, alone or inside a wrapper that adds a vision tower or another head.
    read : callable, optional
        Reads tensors of the layers from disk, if the layers are on torch's meta device.

    Raises
    ------
    UserError
        If the model has no ModuleList, or text goes through none.
    """
    candidates: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            name.startswith(f"{outer}.") for outer in candidates
        ):
            candidates[name] = module
    if not candidates:
        raise UserError(
            f"{type(model).__name__} has no ModuleList of decoder layers, so there is nothing to quantize"
        )
    prefix = _list_with_text(model, candidates)
    layers = candidates[prefix]
    linears = [ternarized(layer) for layer in layers]
    uses = Counter(id(linear.weight) for own in linears for linear in own.values())
    linears = [
        {name: linear for name, linear in own.items() if uses[id(linear.weight)] == 1} for own in linears
    ]
    return DecoderLayers(prefix, layers, linears, read)


@torch.no_grad()
def _list_with_text(model: nn.Module, candidates: dict[str, nn.ModuleList]) -> str:
    """Name the list of layers whose inputs are others for another text.

    Of several (there may be a list of projections before the decoder) it is the heaviest. The forward pass
    ends where its outcome is known: for most models, in front of the first layer.

    Raises
    ------
    UserError
        If there is none.
    """
    by_weight = sorted(candidates, key=lambda name: _weights_in(candidates[name]), reverse=True)
    device = next(model.parameters()).device
    texts = torch.arange(TEXTS, device=device)[:, None] + torch.arange(2, device=device)
    entered: set[str] = set()

    def watch(name: str) -> Callable[..., None]:
        def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(states, torch.Tensor) or not _differ(states):
                return
            entered.add(name)
            # Only decoder layers are ever left on disk, and they cannot run here.
            if name == by_weight[0] or any(p.is_meta for p in candidates[name].parameters()):
                raise _Found

        return enter

    handles = [
        layer.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, layers in candidates.items()
        for layer in layers
    ]
    reason = ""
    try:
        model(**as_text(model, texts), use_cache=False)
    except _Found:
        pass
    except Exception as error:  # a model may want more than text; layers before the failure have been entered
        reason = f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    finally:
        for handle in handles:
            handle.remove()
    for name in by_weight:
        if name in entered:
            return name
    raise UserError(
        f"text alone does not go through any list of layers of {type(model).__name__}, so there is nothing "
        f"to quantize{reason}"
    )


def _differ(states: torch.Tensor) -> bool:
    """Whether hidden states have an axis of texts, along which they are not the same."""
    texts = [states.movedim(axis, 0) for axis, size in enumerate(states.shape) if size == TEXTS]
    return any(states.is_meta or not torch.equal(along[0], along[1]) for along in texts)


class _Found(Exception):
    """Ends a forward pass once the decoder layers are found."""


def find_decoder_layers(model: nn.Module, read: Reader | None = None, strict: bool = False) -> DecoderLayers:
    """Find the decoder layers as `locate_layers` does, and check that they can be ternarized.

    Parameters
    ----------
    model, read
        As for `locate_layers`.
    strict : bool
        Whether to refuse layers with parameters that are not understood.

    Raises
    ------
    UserError
        If there are no decoder layers, there is nothing to ternarize in them, a weight is not finite, or,
        with `strict`, a layer has parameters that are not understood.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only models can be quantized"
        )
    found = locate_layers(model, read)
    if strict and (unknown := found.not_understood()):
        raise UserError(
            f"{type(model).__name__} has matrices that are not understood, or shared by layers: "
            f"{describe_parameters(model, unknown)}; without --strict they stay as they are"
        )
    if not found.named_linears():
        raise UserError(f"{type(model).__name__} has nothing to quantize: no matrices in {found.prefix}")
    for name, parameter in model.named_parameters():
        require_finite(name, parameter)
    return found


def _weights_in(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


def require_finite(name: str, weight: torch.Tensor) -> None:
    """Refuse weights that hold NaN or infinity."""
    if weight.is_meta:
        return
    finite = torch.isfinite(weight)
    if not finite.all():
        place = (~finite).nonzero()[0].tolist()
        raise UserError(f"{name}{place} is {weight[tuple(place)].item()}; all weights must be finite")
