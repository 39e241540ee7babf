"""Find what a decoder layer adds to the residual stream as it is, and watch a pass through a layer."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn

from harness.calibration.calls import moved
from harness.calibration.passage import Passage, WorkingLayer, brought
from harness.models.experts import DOWN, Experts, place_of

# Share of a module's output by which a stream may differ from the sum of its parts, to allow for rounding.
ADDED = 0.01


@dataclass(frozen=True)
class Writer:
    """A matrix, or a mixture of experts, whose output is a summand of the residual stream.

    Attributes
    ----------
    name : str
        Name in the layer of the matrix, or of the `Experts`.
    block : str
        Name of the module whose output is added to the stream: the writer itself, or what holds it and
        others, such as experts and shared experts.
    """

    name: str
    block: str


@dataclass
class Seen:
    """What modules of a layer read and write on one window.

    Attributes
    ----------
    inputs, outputs : dict of str to tensor
        By the name of the module.
    mixtures : dict of str to tuple of tensors
        What `Experts` read, as `Experts.reading` gives it.
    output : tensor, optional
        Output of the layer, if it ran to the end.
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    mixtures: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    output: torch.Tensor | None = None

    def stream(self, start: torch.Tensor, blocks: list[str]) -> torch.Tensor:
        """The residual stream after these blocks, (tokens, width) float32."""
        return rows_of(start).float() + sum(rows_of(self.outputs[name]).float() for name in blocks)


@dataclass(frozen=True)
class Wanted:
    """Names of the modules to watch: matrices' inputs, what `Experts` read, outputs of any modules."""

    inputs: list[str]
    mixtures: list[str]
    outputs: list[str]


@torch.no_grad()
def watch(
    layer: WorkingLayer, hidden: torch.Tensor, window: int, wanted: Wanted, to_the_end: bool = False
) -> Seen:
    """Run a layer on a window until these modules have been used, or to its end."""
    seen = Seen()
    count = len(wanted.inputs) + len(wanted.mixtures) + len(wanted.outputs)

    def note(found: dict[str, Any], name: str, value: Any) -> None:
        found[name] = value
        if not to_the_end and len(seen.inputs) + len(seen.mixtures) + len(seen.outputs) == count:
            raise _Done

    with ExitStack() as hooks:
        module = layer.module.get_submodule
        for name in wanted.inputs:

            def enter(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                if name not in seen.inputs:  # what follows the first use is zeros
                    note(seen.inputs, name, args[0])

            hooks.callback(module(name).register_forward_pre_hook(enter).remove)
        for name in wanted.mixtures:

            def mix(experts: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                note(seen.mixtures, name, cast(Experts, experts).reading(*args))

            hooks.callback(module(name).register_forward_pre_hook(mix).remove)
        for name in wanted.outputs:

            def leave(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
                note(seen.outputs, name, first_of(output))

            hooks.callback(module(name).register_forward_hook(leave).remove)
        with suppress(_Done):
            seen.output = layer.run(hidden, window)
    return seen


class _Done(Exception):
    """Ends a pass through a layer once everything needed was seen."""


@torch.no_grad()
def stream_writers(passage: Passage, layer: WorkingLayer, groups: list[list[str]]) -> list[Writer]:
    """Find the matrices and mixtures of experts whose outputs are summands of the residual stream.

    A module's output is added to the stream if the stream before it and the output add up to the input of a
    later module, or to the output of the layer, within `ADDED` of the output's size. Where a norm or a factor
    stands between, they do not. A mixture, and a matrix beside it such as that of a shared expert, is a
    summand of such an output if the output grows by as much as the mixture's or the matrix's own when that is
    doubled. The layer runs in float32: in 16 bits, one large channel of the stream would hide the output.

    Returns
    -------
    list of Writer
        In the order of their use.
    """
    compute = replace(passage.compute, dtype=torch.float32)
    module = passage.decoder.working_copy(layer.index, compute)
    call = passage.calls[layer.index].to(compute)
    hidden, handed = brought(passage.hidden[0], compute), moved(passage.handed[0], compute)
    alone = [group[0] for group in groups if len(group) == 1]
    places = {name: place_of(module, name) for name in alone}
    mixtures = {place.experts for place in places.values() if place is not None and place.part == DOWN}
    matrices = {name for name in alone if places[name] is None}
    around = {outer: name for name in mixtures for outer in _enclosing(name)}
    names = {*matrices, *mixtures, *around}

    stream = rows_of(hidden)
    seen: list[torch.Tensor] = []
    entered: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    made: dict[str, tuple[int, torch.Tensor]] = {}
    with ExitStack() as hooks:
        for name, part in module.named_modules():
            if name:

                def note(_: nn.Module, args: Any, kwargs: dict[str, Any], name: str = name) -> None:
                    entered[name] = args, kwargs
                    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
                    seen.extend(rows_of(t) for t in tensors if t.ndim > 1)

                hooks.callback(part.register_forward_pre_hook(note, with_kwargs=True).remove)
        for name in names:

            def keep(part: nn.Module, args: Any, output: Any, name: str = name) -> None:
                output = part.written(output) if isinstance(part, Experts) else first_of(output)
                made[name] = (len(seen), rows_of(output).clone())  # Llama 4 adds to it in place

            hooks.callback(module.get_submodule(name).register_forward_hook(keep).remove)
        seen.append(rows_of(call(module, hidden, 0, handed)))

    writers: list[Writer] = []
    for name, (first, output) in sorted(made.items(), key=lambda item: item[1][0]):
        if output.shape != stream.shape:
            continue
        # Of modules that hold one another, the innermost comes first, and the others add nothing new.
        if any(name in _enclosing(writer.block) for writer in writers):
            continue
        wanted = stream + output
        later = (states for states in seen[first:] if states.shape == wanted.shape)
        if not any((states - wanted).norm() <= ADDED * output.norm() for states in later):
            continue
        stream = wanted
        if name in matrices or name in mixtures:
            writers.append(Writer(name, name))
            continue
        parts = [part for part in made if part.startswith(f"{name}.") and part in matrices | mixtures]
        for part in sorted(parts, key=lambda part: made[part][0]):
            if made[part][1].shape == output.shape:
                more = _doubled(module, name, part, *entered[name]) - output
                if (more - made[part][1]).norm() <= ADDED * made[part][1].norm():
                    writers.append(Writer(part, name))
    return writers


def _doubled(
    layer: nn.Module, block: str, part: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """Run a block of a layer with twice the output of one of its modules."""
    handle = layer.get_submodule(part).register_forward_hook(lambda _, args, output: 2 * output)
    try:
        return rows_of(first_of(layer.get_submodule(block)(*args, **kwargs)))
    finally:
        handle.remove()


def _enclosing(name: str) -> list[str]:
    """Names of the modules in a layer that hold a module, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def first_of(output: Any) -> torch.Tensor:
    """The output of a module, or the first of several."""
    return output[0] if isinstance(output, tuple | list) else output


def rows_of(states: torch.Tensor) -> torch.Tensor:
    """Tokens as rows, (tokens, width)."""
    return states.reshape(-1, states.shape[-1])
