"""Targets from the original model: run it beside the ternary one, and sum what the ternary outputs lack.

Hidden states of both models pass through every layer, the original ones through the original layer. A matrix
is then fitted to what brings its outputs, computed from the ternary model's inputs, closest to the original
model's; see `reference.targets`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from harness.calibration.gram import GramSum, ProductSum
from harness.calibration.passage import Passage, WorkingLayer, brought
from harness.models.experts import family

# Maps weights (n, m), the Gram matrix (m, m) of their inputs and the lost products (n, m) to the weights to
# quantize; `reference.targets.shift_targets` with its settings.
Shift = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]

# What one pass of an original layer shows is kept up to this size; more is computed again when it is needed.
KEPT_BYTES = 2e9

# Share of a matrix's output by which a stream may differ from the sum of its parts, to allow for rounding.
ADDED = 0.01


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
    tokens : int
        Number of inputs.
    lost : tensor, optional
        (n, m): the lost products (`reference.targets.lost_products`) of the only matrix of the group.
        Or (m, m): products of the inputs' differences with the inputs, which weights turn into lost products.
        None for matrices that are fitted to their own weights.
    of_outputs : bool
        Whether `lost` is of the first kind.
    """

    gram: torch.Tensor
    tokens: int
    lost: torch.Tensor | None = None
    of_outputs: bool = False

    @classmethod
    def of(cls, total: GramSum) -> Statistics:
        """Return the statistics of matrices that are fitted to their own weights."""
        return cls(total.finish(), total.rows)

    def lost_products(self, weight: torch.Tensor) -> torch.Tensor:
        """Lost products of a matrix of the group, (n, m) float64; `lost` must not be None."""
        assert self.lost is not None
        return self.lost if self.of_outputs else weight.to(self.lost.dtype) @ self.lost


class Beside:
    """The original layer, which runs beside the layer that is quantized.

    Experts have no targets: the original may route the tokens of an expert to other experts.

    What a pass over all windows shows is kept if it takes at most `KEPT_BYTES`, so that one pass is enough.

    Parameters
    ----------
    passage : Passage
        Hidden states of both models.
    layer : WorkingLayer
        The layer before its quantization.
    groups : list of lists of str
        Matrices that share an input, in the order of their use.
    targets : Targets
        What matrices are fitted to.
    """

    def __init__(
        self, passage: Passage, layer: WorkingLayer, groups: list[list[str]], targets: Targets
    ) -> None:
        self.passage, self.targets = passage, targets
        self.layer = passage.enter(layer.index)
        groups = [group for group in groups if family(layer.module, group[0]) is None]
        self.writers = stream_writers(passage, layer, groups) if targets.stream else []
        linears = layer.linears
        self._inputs = [group[0] for group in groups if group[0] not in self.writers]
        width = sum(linears[name].in_features for name in self._inputs)
        width += sum(linears[name].out_features for name in self.writers)
        tokens = sum(states[..., 0].numel() for states in passage.originals)
        fits = 4 * tokens * (width + passage.originals[0].shape[-1]) <= KEPT_BYTES
        self._kept: list[_Seen] | None = [] if fits else None

    @torch.no_grad()
    def collect(
        self, layer: WorkingLayer, groups: list[list[str]], step: Callable[[], object] = lambda: None
    ) -> list[Statistics]:
        """Sum the statistics of some groups' inputs over all windows of both models.

        Parameters
        ----------
        layer : WorkingLayer
            The layer as it is now.
        groups : list of lists of str
            Matrices that share an input.
        step : callable
            Called after every window.
        """
        inputs = [group[0] for group in groups]
        linears, device = layer.linears, self.passage.compute.device
        grams = {
            name: GramSum(linears[name].in_features, device) for name in inputs if family(layer.module, name)
        }
        sums = {
            name: _Sums(linears[name], name in self.writers, self.passage)
            for name in inputs
            if name not in grams
        }
        writing = [self.writers.index(name) for name in inputs if name in self.writers]
        outputs = self.writers[: 1 + max(writing, default=-1)]
        for i, states in enumerate(self.passage.hidden):
            here = brought(states, self.passage.compute)
            ours = _watch(layer, here, inputs, outputs)
            for name, gram in grams.items():
                gram.add(_rows(ours.inputs[name]))
            if sums:
                self._add(sums, i, here, ours, outputs)
            step()
        finished = {name: total.finish() for name, total in sums.items()}
        return [finished[name] if name in finished else Statistics.of(grams[name]) for name in inputs]

    def _add(
        self, sums: dict[str, _Sums], i: int, here: torch.Tensor, ours: _Seen, outputs: list[str]
    ) -> None:
        """Add a window, as both models see it, to the sums of matrices with targets."""
        theirs = self._seen(i, [name for name in sums if name not in self.writers], outputs)
        for name, total in sums.items():
            if name in self.writers:
                before = self.writers[: 1 + self.writers.index(name)]
                there = self.passage.originals[i].to(here.device)
                total.add_stream(
                    ours.inputs[name],
                    ours.stream(here, before),
                    theirs.stream(there, before),
                    self.targets.token_weights,
                )
            else:
                total.add_inputs(ours.inputs[name], theirs.inputs[name])

    @torch.no_grad()
    def advance(self) -> None:
        """Replace the hidden states of the original model by the original layer's outputs."""
        for i, states in enumerate(self.passage.originals):
            output = self._kept[i].output if self._kept else None
            if output is not None:
                states.copy_(output, non_blocking=True)
            else:
                self.passage.overwrite(states, self.layer)

    def _seen(self, i: int, inputs: list[str], outputs: list[str]) -> _Seen:
        """What the original layer reads and writes on a window; more than was asked for, if that is kept."""
        hidden = brought(self.passage.originals[i], self.passage.compute)
        if self._kept is None:
            return _watch(self.layer, hidden, inputs, outputs)
        if i == len(self._kept):
            self._kept.append(_watch(self.layer, hidden, self._inputs, self.writers, to_the_end=True))
        return self._kept[i]


class _Sums:
    """Sums over windows for one group of matrices."""

    def __init__(self, linear: nn.Linear, writes: bool, passage: Passage) -> None:
        device = passage.compute.device
        self.writes = writes
        self.gram = GramSum(linear.in_features, device)
        rows = linear.out_features if writes else linear.in_features
        self.lost = ProductSum(rows, linear.in_features, device)

    def add_inputs(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Add a window by the inputs in both models."""
        x = _rows(ours)
        self.gram.add(x)
        self.lost.add(_rows(theirs).float() - x.float(), x)

    def add_stream(
        self, ours: torch.Tensor, stream: torch.Tensor, true_stream: torch.Tensor, weighted: bool
    ) -> None:
        """Add a window by the inputs, and the residual streams of both models after the matrix."""
        x, lost = _rows(ours), true_stream - stream
        if weighted:
            size = true_stream.square().mean(dim=1, keepdim=True)
            root = torch.where(size > 0, size, torch.inf).rsqrt()
            x, lost = root * x, root * lost
        self.gram.add(x)
        self.lost.add(lost, x)

    def finish(self) -> Statistics:
        return Statistics(self.gram.finish(), self.gram.rows, self.lost.finish(), self.writes)


@torch.no_grad()
def stream_writers(passage: Passage, layer: WorkingLayer, groups: list[list[str]]) -> list[str]:
    """Find the matrices whose outputs are added to the residual stream as they are.

    A matrix is one of them if the stream before it and its output add up to the input of a later module, or
    to the output of the layer, within `ADDED` of the output's size. Where a norm or a factor stands between,
    they do not. The layer runs in float32: in 16 bits, one large channel of the stream would hide the output.

    Returns
    -------
    list of str
        Their names in the layer, in the order of their use.
    """
    compute = replace(passage.compute, dtype=torch.float32)
    module = passage.decoder.working_copy(layer.index, compute)
    call = passage.calls[layer.index].to(compute)
    hidden = brought(passage.hidden[0], compute)
    stream = _rows(hidden)
    seen: list[torch.Tensor] = []
    made: dict[str, tuple[int, torch.Tensor]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.extend(_rows(t) for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.ndim > 1)

    with ExitStack() as hooks:
        for name, part in module.named_modules():
            if name:
                hooks.callback(part.register_forward_pre_hook(note, with_kwargs=True).remove)
        for name in layer.linears:

            def keep(module: nn.Module, args: Any, output: torch.Tensor, name: str = name) -> None:
                made[name] = (len(seen), _rows(output))

            hooks.callback(module.get_submodule(name).register_forward_hook(keep).remove)
        seen.append(_rows(call(module, hidden)))

    writers = []
    alone = {group[0] for group in groups if len(group) == 1}
    for name, (first, output) in sorted(made.items(), key=lambda item: item[1][0]):
        if name not in alone or output.shape != stream.shape:
            continue
        wanted = stream + output
        later = (states for states in seen[first:] if states.shape == wanted.shape)
        if any((states - wanted).norm() <= ADDED * output.norm() for states in later):
            writers.append(name)
            stream = wanted
    return writers


@dataclass
class _Seen:
    """Inputs and outputs of matrices on one window, and the output of the layer if it ran to the end."""

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    output: torch.Tensor | None = None

    def stream(self, start: torch.Tensor, writers: list[str]) -> torch.Tensor:
        """The residual stream after these matrices, (tokens, width) float32."""
        return _rows(start).float() + sum(_rows(self.outputs[name]).float() for name in writers)


@torch.no_grad()
def _watch(
    layer: WorkingLayer,
    hidden: torch.Tensor,
    inputs: list[str],
    outputs: list[str],
    to_the_end: bool = False,
) -> _Seen:
    """Run a layer until these matrices have been used, or to its end."""
    seen = _Seen({}, {})

    def done() -> None:
        if not to_the_end and len(seen.inputs) == len(inputs) and len(seen.outputs) == len(outputs):
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
            seen.output = layer.call(layer.module, hidden)
    return seen


class _Done(Exception):
    """Ends a pass through a layer once everything needed was seen."""


def _rows(states: torch.Tensor) -> torch.Tensor:
    """Tokens as rows, (tokens, width)."""
    return states.reshape(-1, states.shape[-1])
