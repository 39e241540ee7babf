"""Calibrate layer by layer: collect inputs, sum Gram matrices, fit matrices, compute outputs.

Every decoder layer is fitted to the outputs of the layers before it, which are already quantized. Several
processes share the work: each runs every layer on its own windows and fits its own matrices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from harness.calibration.experts import batches
from harness.calibration.fits import Adopt, Fit, FittedMatrix, fit_matrices
from harness.calibration.methods import Method
from harness.calibration.owners import Owners, deal, own_lost, own_statistics
from harness.calibration.passage import Passage, WorkingLayer
from harness.calibration.sums import Statistics
from harness.calibration.targets import Beside, Targets
from harness.compute import Compute
from harness.models.experts import family

# Called with the number of forward passes (of one window each) just finished, and their stage.
Progress = Callable[[int, str], object]


@dataclass(frozen=True)
class FittedLayer:
    """One decoder layer after quantization.

    Attributes
    ----------
    matrices : list of FittedMatrix
        Its matrices, in the order in which the layer uses them.
    groups : list of lists of str
        Full names of the matrices that read the same input.
    experts : dict of str to str
        Families of the matrices of experts, by the full names of both.
    seconds : dict of str to float
        Time by stage: load, inputs, fits, outputs.
    sent : int
        Bytes of tensors that processes have sent each other.
    """

    matrices: list[FittedMatrix]
    groups: list[list[str]]
    experts: dict[str, str]
    seconds: dict[str, float]
    sent: int = 0


@torch.no_grad()
def fit_layers(
    passage: Passage,
    method: Method,
    *,
    first: int = 0,
    true_sequential: bool = False,
    targets: Targets | None = None,
    own: Mapping[str, Method] | None = None,
    adopt: Adopt = torch.Tensor.numpy,
    progress: Progress = lambda steps, stage: None,
) -> Iterator[FittedLayer]:
    """Quantize the decoder layers in place, one after the other; yield each finished layer.

    Parameters
    ----------
    passage : Passage
        Inputs of layer `first`; every layer overwrites them with its outputs. Layers in memory get the
        dequantized weights, in the model's dtype.
    method : callable
        Maps weights and Gram matrix to the quantized matrix.
    first : int
        Index of the first layer to quantize.
    true_sequential : bool
        Whether to collect inputs again after each group of matrices that share an input, so that o_proj
        is fitted to the outputs of the ternarized q/k/v.
    targets : Targets, optional
        What to fit matrices to instead of their own weights; the passage must hold the hidden states of the
        original model (`Passage.keep_original`).
    own : mapping of str to callable, optional
        Methods of single matrices, by their full names.
    adopt : callable
        Makes an array of the library that fits matrices of a tensor that another process has sent.
    progress : callable
        Called with the number of forward passes (of one window each) just finished, and the stage.

    Raises
    ------
    FitError
        If a matrix cannot be quantized or its inputs are not finite; the message names the matrix.
    UserError
        If a matrix is used more than once in its layer, or not at all.
    """

    compute, ranks = passage.compute, passage.compute.ranks

    def fit_of(name: str) -> Fit:
        return _towards(targets, (own or {}).get(name, method))

    for index in range(first, len(passage.calls)):
        clock, sent = _Clock(compute), ranks.sent
        with clock("load"):
            layer = passage.enter(index)
        groups = ranks.share(passage.input_groups(layer))
        beside = Beside(passage, layer, groups, targets) if targets is not None else None
        matrices: dict[str, FittedMatrix] = {}
        for batch in batches(layer, groups) if true_sequential else [groups][: len(groups)]:
            weights = {name: layer.linears[name].weight.detach() for group in batch for name in group}
            turns = _turns(passage, layer, batch, beside, partial(progress, 1, "inputs"))
            for turn, owners, known in clock.through("inputs", turns):
                with clock("fits"):
                    names = dict.fromkeys(name.rpartition(".")[2] for group in turn for name in group)
                    progress(0, ", ".join(names))
                    for matrix in fit_matrices(layer, turn, weights, known, fit_of, owners, compute, adopt):
                        matrices[matrix.name] = matrix  # the last of several fits
            del turns, known, weights
        with clock("outputs"):
            if beside is not None:
                beside.advance()
            passage.advance(layer, partial(progress, 1, "outputs"))
        full_names = [[layer.full_name(name) for name in group] for group in groups]
        families = {name: family(layer.module, name) for name in layer.linears}
        experts = {layer.full_name(n): layer.full_name(of) for n, of in families.items() if of}
        volume = ranks.total([ranks.sent - sent])[0]
        yield FittedLayer(list(matrices.values()), full_names, experts, clock.seconds, volume)
        # Free the weights and Gram matrices of this layer before those of the next are allocated.
        del matrices, layer, beside


# Groups of matrices that are fitted together, who fits each of them, and what is known about the inputs of
# those of this process.
_Turn = tuple[list[list[str]], Owners, dict[str, Statistics]]


def _turns(
    passage: Passage,
    layer: WorkingLayer,
    batch: list[list[str]],
    beside: Beside | None,
    step: Callable[[], object],
) -> Iterator[_Turn]:
    """Collect what is known about the inputs of a batch, for those groups that are fitted next."""
    ranks = passage.compute.ranks
    turns = [batch] if beside is None else beside.turns(batch)
    shapes = {name: linear.weight.shape for name, linear in layer.linears.items()}
    owners: Owners = {}
    for turn in turns:
        owners |= deal({name: shapes[name] for group in turn for name in group}, ranks.size)
    sums = passage.collect(layer, batch, step) if beside is None else beside.collect(layer, batch, step)
    known = own_statistics(layer, batch, sums, owners, ranks)
    for place, turn in enumerate(turns):
        if beside is not None and place:
            lost = beside.collect_lost(layer, turn, step)
            for name, own in own_lost(turn, lost, owners, ranks).items():
                known[name] = beside.aim_again(layer, name, known[name], own)
        yield turn, owners, known


def _towards(targets: Targets | None, method: Method) -> Fit:
    """Fit a matrix to its target instead of its weights, if there is one."""

    def fit(weight: torch.Tensor, statistics: Statistics) -> Any:
        if targets is not None and statistics.lost is not None:
            weight = targets.shift(weight, statistics.gram, statistics.lost_products(weight))
        return method(weight, statistics.gram)

    return fit


class _Clock:
    """Measures seconds by stage."""

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.compute.wait()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin

    def through(self, stage: str, turns: Iterator[_Turn]) -> Iterator[_Turn]:
        """Pass on turns, and count the time that it takes to compute each."""
        while True:
            with self(stage):
                turn = next(turns, None)
            if turn is None:
                return
            yield turn
