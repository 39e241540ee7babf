"""Calibrate layer by layer: collect inputs, sum Gram matrices, fit matrices, compute outputs.

Every decoder layer is fitted to the outputs of the layers before it, which are already quantized.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from harness.calibration.experts import batches, fill_up
from harness.calibration.grid_range import lost_share
from harness.calibration.methods import FitError, Method
from harness.calibration.passage import Passage, WorkingLayer
from harness.calibration.sums import Statistics
from harness.calibration.targets import Beside, Targets
from harness.compute import Compute
from harness.models.experts import family
from reference.types import TernaryMatrix

# Called with the number of forward passes (of one window each) just finished, and their stage.
Progress = Callable[[int, str], object]


@dataclass(frozen=True)
class FittedMatrix:
    """One matrix of a layer after quantization."""

    name: str  # in the whole model
    weight: torch.Tensor  # the original
    gram: torch.Tensor
    result: Any  # TernaryMatrix, or for the baselines the dense (n, m) array
    seconds: float
    tokens: int  # inputs that were seen; for a matrix of an expert, those of the tokens routed to it
    lost: float = 0.0  # share of blocks whose alpha is too small to be stored


@dataclass(frozen=True)
class FittedLayer:
    """One decoder layer after quantization.

    Attributes
    ----------
    matrices : list of FittedMatrix
        Its matrices, in the order in which the layer uses them.
    groups : list of lists of str
        Full names of the matrices that read the same input.
    experts : list of str
        Full names of the matrices of experts.
    seconds : dict of str to float
        Time by stage: load, inputs, fits, outputs.
    """

    matrices: list[FittedMatrix]
    groups: list[list[str]]
    experts: list[str]
    seconds: dict[str, float]


@torch.no_grad()
def fit_layers(
    passage: Passage,
    method: Method,
    *,
    first: int = 0,
    true_sequential: bool = False,
    targets: Targets | None = None,
    own: Mapping[str, Method] | None = None,
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
    progress : callable
        Called with the number of forward passes (of one window each) just finished, and the stage.

    Raises
    ------
    FitError
        If a matrix cannot be quantized or its inputs are not finite; the message names the matrix.
    UserError
        If a matrix is used more than once in its layer, or not at all.
    """

    def fit_of(name: str) -> _Fit:
        return _towards(targets, (own or {}).get(name, method))

    for index in range(first, len(passage.calls)):
        clock = _Clock(passage.compute)
        with clock("load"):
            layer = passage.enter(index)
        groups = passage.input_groups(layer)
        beside = Beside(passage, layer, groups, targets) if targets is not None else None
        matrices: list[FittedMatrix] = []
        for batch in batches(layer, groups) if true_sequential else [groups]:
            with clock("inputs"):
                counted = partial(progress, 1, "inputs")
                if beside is None:
                    statistics = [Statistics.of(total) for total in passage.collect(layer, batch, counted)]
                else:
                    statistics = beside.collect(layer, batch, counted)
                known = dict(zip(map(tuple, batch), fill_up(layer, batch, statistics), strict=True))
            for turn in [batch] if beside is None else beside.turns(batch):
                if beside is not None and turn[0] != batch[0]:
                    with clock("inputs"):
                        for group, lost in zip(turn, beside.collect_lost(layer, turn, counted), strict=True):
                            known[tuple(group)] = replace(known[tuple(group)], lost=lost)
                with clock("fits"):
                    names = dict.fromkeys(name.rpartition(".")[2] for group in turn for name in group)
                    progress(0, ", ".join(names))
                    statistics = [known[tuple(group)] for group in turn]
                    matrices += _fit(layer, turn, statistics, fit_of, passage.compute)
            del statistics, known
        with clock("outputs"):
            if beside is not None:
                beside.advance()
            passage.advance(layer, partial(progress, 1, "outputs"))
        full_names = [[layer.full_name(name) for name in group] for group in groups]
        experts = [layer.full_name(name) for name in layer.linears if family(layer.module, name)]
        yield FittedLayer(matrices, full_names, experts, clock.seconds)
        # Free the weights and Gram matrices of this layer before those of the next are allocated.
        del matrices, layer, beside


# Quantizes a matrix, given what is known about its inputs.
_Fit = Callable[[torch.Tensor, Statistics], Any]
# A matrix by its full name, its weights, its inputs, and how it is quantized.
_Job = tuple[str, torch.Tensor, Statistics, _Fit]


def _towards(targets: Targets | None, method: Method) -> _Fit:
    """Fit a matrix to its target instead of its weights, if there is one."""

    def fit(weight: torch.Tensor, statistics: Statistics) -> Any:
        if targets is not None and statistics.lost is not None:
            weight = targets.shift(weight, statistics.gram, statistics.lost_products(weight))
        return method(weight, statistics.gram)

    return fit


def _fit(
    layer: WorkingLayer,
    groups: list[list[str]],
    statistics: list[Statistics],
    fit_of: Callable[[str], _Fit],
    compute: Compute,
) -> Iterator[FittedMatrix]:
    """Quantize matrices of a layer, and replace their weights by the dequantized ones."""
    linears = layer.linears
    jobs: list[_Job] = []
    for group, known in zip(groups, statistics, strict=True):
        if not torch.isfinite(known.gram).all():
            name = layer.full_name(group[0])
            raise FitError(f"{name}: its inputs on the calibration text are not finite")
        full_names = map(layer.full_name, group)
        weights = [linears[name].weight.detach() for name in group]
        jobs += [
            (name, weight, known, fit_of(name)) for name, weight in zip(full_names, weights, strict=True)
        ]
    names = [name for group in groups for name in group]
    for name, (matrix, dense) in zip(names, _quantize_together(jobs, compute), strict=True):
        layer.put(name, dense)
        yield matrix


def _quantize_together(jobs: list[_Job], compute: Compute) -> Iterator[tuple[FittedMatrix, torch.Tensor]]:
    """Quantize matrices in parallel, to use all cores; each gets an equal share of the BLAS threads."""
    if compute.device.type == "cuda":  # a single matrix saturates the GPU
        yield from (_quantize(*job) for job in jobs)
        return
    cores = torch.get_num_threads()
    workers = min(len(jobs), cores)
    # Start the longest fit first; time grows with the cube of the columns.
    order = sorted(range(len(jobs)), key=lambda i: len(jobs[i][2].gram), reverse=True)
    pool = ThreadPoolExecutor(workers)
    try:
        with threadpool_limits(max(1, cores // workers), "blas"):
            running = {i: pool.submit(_quantize, *jobs[i]) for i in order}
            for future in wait(running.values(), return_when=FIRST_EXCEPTION).done:
                future.result()  # raise the first failure of any matrix
            yield from (running[i].result() for i in range(len(jobs)))
    finally:
        # After Ctrl-C or a failure, start no further matrix.
        pool.shutdown(cancel_futures=True)


def _quantize(
    name: str, weight: torch.Tensor, statistics: Statistics, method: _Fit
) -> tuple[FittedMatrix, torch.Tensor]:
    """Quantize one matrix; return it with its dense weights, float32 or wider."""
    begin = time.perf_counter()
    try:
        result = method(weight, statistics)
    except ValueError as error:  # numpy's LinAlgError is one
        raise FitError(f"{name}: {error}") from None
    seconds = time.perf_counter() - begin
    gram, tokens = statistics.gram, statistics.tokens
    if not isinstance(result, TernaryMatrix):
        return FittedMatrix(name, weight, gram, result, seconds, tokens), torch.from_dlpack(result)
    lost = lost_share(name, weight, gram, result)
    fitted = FittedMatrix(name, weight, gram, result, seconds, tokens, lost)
    return fitted, torch.from_dlpack(result.dequantize())


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
