"""Hold the hidden states of all calibration windows between decoder layers, and run the next layer on them.

Only one decoder layer at a time is on the device that computes. Between layers, hidden states are kept in the
model's dtype, on the device if they fit and in host memory if not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from harness.calibration.calls import LayerCall
from harness.calibration.gram import windows_per_shard
from harness.calibration.sums import Rows, Sums
from harness.compute import Compute
from harness.distributed.ranks import Ranks
from harness.errors import UserError
from harness.models.decoder import DecoderLayers, require_finite
from harness.words import counted

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _no_step() -> None:
    """The default of `step`: count nothing."""


def brought(states: torch.Tensor, compute: Compute) -> torch.Tensor:
    """Move hidden states to the device, and cast them to the dtype, that layers run in."""
    return states.to(compute.device, compute.dtype, non_blocking=True)


@dataclass(frozen=True)
class WorkingLayer:
    """A copy of a decoder layer on the device that computes, in the dtype that layers run in.

    Attributes
    ----------
    module : nn.Module
        The copy.
    call : LayerCall
        Its arguments.
    index : int
        Its index among the model's decoder layers.
    decoder : DecoderLayers
        The layers of the model.
    handed : list of mappings
        What earlier layers left for this one, for every window.
    """

    module: nn.Module
    call: LayerCall
    index: int
    decoder: DecoderLayers
    handed: list[MutableMapping[Any, Any]]

    def run(self, hidden: torch.Tensor, window: int) -> torch.Tensor:
        """Run the layer on the hidden states of a window; they must have its device and dtype."""
        return self.call(self.module, hidden, window, self.handed[window])

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The matrices to quantize, as copied, by their names in the layer."""
        names = self.decoder.linears[self.index]
        return {name: cast(nn.Linear, self.module.get_submodule(name)) for name in names}

    def full_name(self, name: str) -> str:
        """Return the name in the whole model of a module of the layer."""
        return self.decoder.full_name(self.index, name)

    def put(self, name: str, dense: torch.Tensor) -> None:
        """Replace the weights of a matrix, in the model and in the copy."""
        # Round as loading the checkpoint does: it dequantizes to the dtype of the model.
        dense = dense.to(self.decoder.linears[self.index][name].weight.dtype)
        self.decoder.replace(self.index, name, dense)
        weight = self.linears[name].weight
        weight.data = dense.to(weight.device, weight.dtype)


@dataclass
class Passage:
    """Hidden states of every calibration window, and the decoder layers to run on them.

    Attributes
    ----------
    decoder : DecoderLayers
        The layers.
    hidden : list of (1, seqlen, width) tensors
        Inputs of the next layer; every layer overwrites them with its outputs, in place. Of several
        processes, each has those of its own windows.
    calls : list of LayerCall
        Arguments of each layer.
    compute : Compute
        Where layers run.
    shard : int
        Windows of a shard, the part of a sum that is not divided among processes (`calibration.gram`).
    originals : list of (1, seqlen, width) tensors
        Inputs of the original model's next layer, after `keep_original`; empty before.
    handed, originals_handed : list of mappings
        What layers leave for later ones, in either model, for every window.
    """

    decoder: DecoderLayers
    hidden: list[torch.Tensor]
    calls: list[LayerCall]
    compute: Compute
    shard: int = 1
    originals: list[torch.Tensor] = field(default_factory=list)
    handed: list[MutableMapping[Any, Any]] = field(init=False)
    originals_handed: list[MutableMapping[Any, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.handed, self.originals_handed = ([self.calls[0].mapping() for _ in self.hidden] for _ in "12")

    def ends_shard(self, window: int) -> bool:
        """Whether the window with this index among the hidden states is the last of its shard."""
        return window + 1 == len(self.hidden) or (window + 1) % self.shard == 0

    def keep_original(self) -> None:
        """Start to keep the hidden states of the original model beside those of the quantized one."""
        self.originals = [states.clone() for states in self.hidden]

    def place(self, reserved: float | None = None) -> None:
        """Move hidden states to the device if they fit there, else into pinned host memory.

        `reserved` bytes of device memory stay free; half of it by default.
        """
        if reserved is None:
            reserved = self.compute.memory // 2 if self.compute.memory else 0
        placed = self.compute.place([*self.hidden, *self.originals], reserved)
        self.hidden, self.originals = placed[: len(self.hidden)], placed[len(self.hidden) :]

    @torch.no_grad()
    def enter(self, index: int, original: bool = False) -> WorkingLayer:
        """Copy a layer to the device, to run on the hidden states of the quantized or the original model.

        Raises
        ------
        UserError
            If the layer was read from disk and a weight is not finite; the message names it.
        """
        module = self.decoder.working_copy(index, self.compute)
        handed = self.originals_handed if original else self.handed
        layer = WorkingLayer(module, self.calls[index].to(self.compute), index, self.decoder, handed)
        if self.decoder.read is not None:
            for name, parameter in module.named_parameters():
                require_finite(layer.full_name(name), parameter)
        return layer

    @torch.no_grad()
    def advance(self, layer: WorkingLayer, step: Callable[[], object] = _no_step) -> None:
        """Run a layer on every window; its outputs overwrite the hidden states. `step` counts windows."""
        for window, states in enumerate(self.hidden):
            self.overwrite(states, layer, window)
            step()

    def overwrite(self, states: torch.Tensor, layer: WorkingLayer, window: int) -> None:
        """Replace the hidden states of one window by a layer's outputs."""
        states.copy_(layer.run(brought(states, self.compute), window), non_blocking=True)

    @torch.no_grad()
    def again(self, weights: Iterable[dict[str, torch.Tensor]]) -> Iterator[None]:
        """Run finished layers again, from the first, exactly as after their quantization.

        Parameters
        ----------
        weights : iterable of dict
            Dense weights of each layer, by their names in the layer.
        """
        for index, layer_weights in enumerate(weights):
            if self.originals:
                original = self.enter(index, original=True)
                for window, states in enumerate(self.originals):
                    self.overwrite(states, original, window)
            layer = self.enter(index)
            for name, dense in layer_weights.items():
                layer.put(name, dense)
            self.advance(layer)
            self.compute.wait()
            yield

    @torch.no_grad()
    def input_groups(self, layer: WorkingLayer) -> list[list[str]]:
        """Group the names of the matrices that read the same tensor, in the order of their use.

        A matrix may be used again on zeros, which it maps to the same whatever its weights.

        Raises
        ------
        UserError
            If a matrix is used more than once in its layer otherwise, or not at all.
        """
        linears = layer.linears
        readers: dict[int, list[str]] = {}
        kept = []  # keeps inputs alive, so that no two share an id
        used: set[str] = set()

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                if name in used and not args[0].any():
                    return
                used.add(name)
                kept.append(args[0])
                readers.setdefault(id(args[0]), []).append(name)

            return hook

        with _pre_hooks({linears[name]: note(name) for name in linears}):
            layer.run(brought(self.hidden[0], self.compute), 0)
        groups = list(readers.values())
        names = [name for group in groups for name in group]
        idle = sorted(set(linears) - set(names))
        if idle or len(names) != len(set(names)):
            culprit = idle[0] if idle else max(names, key=names.count)
            times = "not used" if idle else "used more than once"
            raise UserError(
                f"{layer.full_name(culprit)} is {times} in a pass through its decoder layer; "
                "such a matrix cannot be calibrated"
            )
        return groups

    @torch.no_grad()
    def collect(
        self, layer: WorkingLayer, groups: list[list[str]], step: Callable[[], object] = _no_step
    ) -> list[Sums]:
        """Sum the Gram matrix of each group's inputs over all windows of this process."""
        linears = layer.linears
        first = [linears[group[0]] for group in groups]
        sums = [Sums(linear.in_features, device=self.compute.device) for linear in first]

        used: set[nn.Module] = set()

        def add(total: Sums) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                if module not in used:  # what follows the first use is zeros
                    used.add(module)
                    total.add(Rows(args[0].reshape(-1, args[0].shape[-1])))

            return hook

        with _pre_hooks({linear: add(total) for linear, total in zip(first, sums, strict=True)}):
            for window, states in enumerate(self.hidden):
                used.clear()
                layer.run(brought(states, self.compute), window)
                if self.ends_shard(window):
                    for total in sums:
                        total.end_shard()
                step()
        return sums

    def checksum(self) -> int:
        """Sum the bit patterns of the hidden states of all processes."""
        return self.compute.ranks.total([sum_bits(self.hidden)])[0]

    def checksum_of_originals(self) -> int:
        """The same for the hidden states of the original model."""
        return self.compute.ranks.total([sum_bits(self.originals)])[0]


def sum_bits(tensors: Sequence[torch.Tensor]) -> int:
    """Sum the bit patterns of tensors, read as integers; sums wrap around at 64 bits."""
    sums = [tensor.view(_BITS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    return int(torch.stack(sums).sum()) if sums else 0


def own_windows(count: int, seqlen: int, ranks: Ranks) -> range:
    """Return which of the windows of a calibration are this process's: whole shards, neighbouring ones.

    Raises
    ------
    UserError
        If there are fewer shards than processes.
    """
    shard = windows_per_shard(count, seqlen)
    shards = -(-count // shard)
    if shards < ranks.size:
        raise UserError(
            f"{counted(count, 'window')} of {seqlen} tokens in {counted(shards, 'shard')}: "
            f"{ranks.size} processes cannot share them; use fewer processes or more windows"
        )
    own = ranks.own(shards)
    return range(shard * own.start, min(shard * own.stop, count))


@contextmanager
def _pre_hooks(hooks: dict[nn.Linear, Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
