"""Targets from the original model: run it beside the ternary one, and sum what the ternary outputs lack.

Hidden states of both models pass through every layer, the original ones through the original layer. A matrix
is then fitted to what brings its outputs, computed from the ternary model's inputs, closest to the original
model's; see `reference.targets`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.calibration.gram import GramSum, ProductSum
from harness.calibration.passage import Passage, WorkingLayer, brought

# Maps weights (n, m), the Gram matrix (m, m) of their inputs and the lost products (n, m) to the weights to
# quantize; `reference.targets.shift_targets` with its settings.
Shift = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]

# A stream and the sum of its parts may differ by this many roundings.
ROUNDINGS = 8


@dataclass(frozen=True)
class Targets:
    """What matrices are fitted to, instead of their own weights.

    Attributes
    ----------
    shift : callable
        Computes the weights to quantize.
    stream : bool
        Whether a matrix that adds to the residual stream makes up for all that the stream lacks, and not only
        for its own outputs.
    token_weights : bool
        Whether tokens count by the inverse square of their stream, for such matrices.
    """

    shift: Shift
    stream: bool = True
    token_weights: bool = True


@dataclass(frozen=True)
class Statistics:
    """What a fit needs to know about the inputs of one group of matrices.

    Attributes
    ----------
    gram : (m, m) float64 tensor
        Gram matrix of the inputs.
    lost : tensor, optional
        (n, m): the lost products (`reference.targets.lost_products`) of the only matrix of the group.
        Or (m, m): products of the inputs' differences with the inputs, which weights turn into lost products.
    of_outputs : bool
        Whether `lost` is of the first kind.
    """

    gram: torch.Tensor
    lost: torch.Tensor | None = None
    of_outputs: bool = False

    def lost_products(self, weight: torch.Tensor) -> torch.Tensor:
        """Lost products of a matrix of the group, (n, m) float64."""
        assert self.lost is not None
        return self.lost if self.of_outputs else weight.to(self.lost.dtype) @ self.lost


def collect(
    passage: Passage,
    original: WorkingLayer,
    layer: WorkingLayer,
    groups: list[list[str]],
    writers: list[str],
    targets: Targets,
    step: Callable[[], object] = lambda: None,
) -> list[Statistics]:
    """Sum the statistics of each group's inputs over all windows of both models.

    Parameters
    ----------
    passage : Passage
        Hidden states of both models.
    original, layer : WorkingLayer
        The layer before quantization, and the layer as it is now.
    groups : list of lists of str
        Matrices that share an input.
    writers : list of str
        Matrices of the layer that add to the residual stream (`stream_writers`), in the order of their use.
    targets : Targets
        What to sum.
    step : callable
        Called after every window.
    """
    device = passage.compute.device
    sums = []
    for group in groups:
        first = layer.linears[group[0]]
        writes = targets.stream and group[0] in writers
        rows = first.out_features if writes else first.in_features
        sums.append((GramSum(first.in_features, device), ProductSum(rows, first.in_features, device), writes))
    inputs = [group[0] for group in groups]
    outputs = writers[: 1 + max((writers.index(name) for name in inputs if name in writers), default=-1)]
    for states, true_states in zip(passage.hidden, passage.originals, strict=True):
        here, there = brought(states, passage.compute), brought(true_states, passage.compute)
        ours = _watch(layer, here, inputs, outputs)
        theirs = _watch(original, there, inputs, outputs)
        for name, (gram, product, writes) in zip(inputs, sums, strict=True):
            x = _rows(ours.inputs[name])
            if not writes:
                gram.add(x)
                product.add(_rows(theirs.inputs[name]).float() - x.float(), x)
                continue
            before = writers[: 1 + writers.index(name)]
            stream, true_stream = (
                _rows(start).float() + sum(_rows(seen.outputs[writer]).float() for writer in before)
                for start, seen in ((here, ours), (there, theirs))
            )
            lost = true_stream - stream
            if targets.token_weights:
                size = true_stream.square().mean(dim=1, keepdim=True)
                root = torch.where(size > 0, size, torch.inf).rsqrt()
                x, lost = root * x, root * lost
            gram.add(x)
            product.add(lost, x)
        step()
    return [Statistics(gram.finish(), product.finish(), writes) for gram, product, writes in sums]


@torch.no_grad()
def stream_writers(passage: Passage, layer: WorkingLayer, groups: list[list[str]]) -> list[str]:
    """Find the matrices whose outputs are added to the residual stream as they are.

    A matrix is one of them if the stream before it and its output add up to the input of a later module, or
    to the output of the layer. Where a norm or a factor stands between, it is not.

    Returns
    -------
    list of str
        Their names in the layer, in the order of their use.
    """
    hidden = brought(passage.hidden[0], passage.compute)
    stream = _rows(hidden)
    seen: list[torch.Tensor] = []
    made: dict[str, tuple[int, torch.Tensor]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.extend(_rows(t) for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.ndim > 1)

    with ExitStack() as hooks:
        for name, module in layer.module.named_modules():
            if name:
                hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        for name, linear in layer.linears.items():

            def keep(module: nn.Module, args: Any, output: torch.Tensor, name: str = name) -> None:
                made[name] = (len(seen), _rows(output))

            hooks.callback(linear.register_forward_hook(keep).remove)
        seen.append(_rows(layer.call(layer.module, hidden)))

    writers = []
    alone = {group[0] for group in groups if len(group) == 1}
    for name, (first, output) in sorted(made.items(), key=lambda item: item[1][0]):
        if name not in alone or output.shape != stream.shape:
            continue
        wanted = stream + output
        slack = ROUNDINGS * torch.finfo(wanted.dtype).eps * wanted.abs().max()
        later = (states for states in seen[first:] if states.shape == wanted.shape)
        if any((states - wanted).abs().max() <= slack for states in later):
            writers.append(name)
            stream = wanted
    return writers


@dataclass
class _Seen:
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


@torch.no_grad()
def _watch(layer: WorkingLayer, hidden: torch.Tensor, inputs: list[str], outputs: list[str]) -> _Seen:
    """Run a layer until these matrices have been used; return their inputs and outputs."""
    seen = _Seen({}, {})

    def done() -> None:
        if len(seen.inputs) == len(inputs) and len(seen.outputs) == len(outputs):
            raise _Done

    with ExitStack() as hooks:
        for name in inputs:

            def before(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                seen.inputs[name] = args[0]
                done()

            hooks.callback(layer.linears[name].register_forward_pre_hook(before).remove)
        for name in outputs:

            def after(module: nn.Module, args: Any, output: torch.Tensor, name: str = name) -> None:
                seen.outputs[name] = output
                done()

            hooks.callback(layer.linears[name].register_forward_hook(after).remove)
        with suppress(_Done):
            layer.call(layer.module, hidden)
    return seen


class _Done(Exception):
    """Ends a pass through a layer once everything needed was seen."""


def _rows(states: torch.Tensor) -> torch.Tensor:
    """Tokens as rows, (tokens, width)."""
    return states.reshape(-1, states.shape[-1])
