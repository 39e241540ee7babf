"""Calibration layer by layer: inputs, Gram matrices, fits, and on to the next layer.

Every decoder layer is fitted to the outputs of the layers before it, which are quantized already.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from harness.calibration.methods import FitError, Method
from harness.calibration.passage import Passage, WorkingLayer
from harness.compute import Compute
from reference.types import TernaryMatrix

# Forward passes of one window just done, and the stage they belong to.
Progress = Callable[[int, str], object]


@dataclass(frozen=True)
class FittedMatrix:
    """One matrix of a layer after quantization."""

    name: str  # in the whole model
    weight: torch.Tensor  # the original
    gram: torch.Tensor
    result: Any  # TernaryMatrix, or for the baselines the dense (n, m) array
    seconds: float


@dataclass(frozen=True)
class FittedLayer:
    """One decoder layer after quantization.

    Attributes
    ----------
    matrices : list of FittedMatrix
        Its matrices, in the order they are computed.
    groups : list of lists of str
        Full names of the matrices that read one and the same input.
    seconds : dict of str to float
        Time by stage: load, inputs, fits, outputs.
    """

    matrices: list[FittedMatrix]
    groups: list[list[str]]
    seconds: dict[str, float]


@torch.no_grad()
def fit_layers(
    passage: Passage,
    method: Method,
    *,
    first: int = 0,
    true_sequential: bool = False,
    progress: Progress = lambda steps, stage: None,
) -> Iterator[FittedLayer]:
    """Quantize the decoder layers in place, one after the other, yielding each when it is done.

    Parameters
    ----------
    passage : Passage
        Hidden states that enter layer `first`; they leave every layer as its outputs. Layers in memory
        get the dequantized weights, in the model's dtype.
    method : callable
        Maps weights and Gram matrix to what replaces the weights.
    first : int
        Index of the layer to begin with.
    true_sequential : bool
        Whether inputs are collected again inside a layer, after each group of matrices that share
        one, so that o_proj is fitted to the outputs of the ternarized q/k/v.
    progress : callable
        Called with the number of forward passes of one window just done, and the stage.

    Raises
    ------
    FitError
        If a matrix cannot be quantized or its inputs are not finite; names the matrix.
    UserError
        If a matrix is used more than once in its layer, or not at all.
    """
    for index in range(first, len(passage.calls)):
        clock = _Clock(passage.compute)
        with clock("load"):
            layer = passage.enter(index)
        groups = passage.input_groups(layer)
        matrices: list[FittedMatrix] = []
        for batch in [[group] for group in groups] if true_sequential else [groups]:
            with clock("inputs"):
                grams = passage.collect(layer, batch, lambda: progress(1, "inputs"))
            with clock("fits"):
                progress(0, ", ".join(name.rpartition(".")[2] for group in batch for name in group))
                matrices += _fit(layer, batch, grams, method, passage.compute)
            del grams
        with clock("outputs"):
            passage.advance(layer, lambda: progress(1, "outputs"))
        full_names = [[layer.full_name(name) for name in group] for group in groups]
        yield FittedLayer(matrices, full_names, clock.seconds)
        # The weights and Gram matrices of a layer need not live beside those of the next.
        del matrices, layer


def _fit(
    layer: WorkingLayer,
    groups: list[list[str]],
    grams: list[torch.Tensor],
    method: Method,
    compute: Compute,
) -> Iterator[FittedMatrix]:
    """Quantize matrices of a layer, and replace them by the dequantized ones."""
    linears = layer.linears
    jobs = []
    for group, gram in zip(groups, grams, strict=True):
        if not torch.isfinite(gram).all():
            name = layer.full_name(group[0])
            raise FitError(f"{name}: its inputs are not finite on the calibration text")
        jobs += [(layer.full_name(name), linears[name].weight.detach(), gram) for name in group]
    names = [name for group in groups for name in group]
    for name, (matrix, dense) in zip(names, _quantize_together(jobs, method, compute), strict=True):
        layer.put(name, dense)
        yield matrix


def _quantize_together(
    jobs: list[tuple[str, torch.Tensor, torch.Tensor]], method: Method, compute: Compute
) -> Iterator[tuple[FittedMatrix, torch.Tensor]]:
    """Quantize matrices side by side, which keeps all cores busy; BLAS threads share what is left."""
    if compute.device.type == "cuda":  # a single matrix saturates it
        yield from (_quantize(*job, method) for job in jobs)
        return
    cores = torch.get_num_threads()
    workers = min(len(jobs), cores)
    # The longest fit, by the cube of its columns, must not be the last to start.
    order = sorted(range(len(jobs)), key=lambda i: len(jobs[i][2]), reverse=True)
    pool = ThreadPoolExecutor(workers)
    try:
        with threadpool_limits(max(1, cores // workers), "blas"):
            running = {i: pool.submit(_quantize, *jobs[i], method) for i in order}
            for future in wait(running.values(), return_when=FIRST_EXCEPTION).done:
                future.result()  # the first failure ends it, whichever matrix it is
            yield from (running[i].result() for i in range(len(jobs)))
    finally:
        # After Ctrl-C or a failure no further matrix is begun.
        pool.shutdown(cancel_futures=True)


def _quantize(
    name: str, weight: torch.Tensor, gram: torch.Tensor, method: Method
) -> tuple[FittedMatrix, torch.Tensor]:
    """A matrix as quantized, and its dense weights, float32 or wider."""
    begin = time.perf_counter()
    try:
        result = method(weight, gram)
    except ValueError as error:  # numpy's LinAlgError is one
        raise FitError(f"{name}: {error}") from None
    seconds = time.perf_counter() - begin
    dense = result.dequantize() if isinstance(result, TernaryMatrix) else result
    return FittedMatrix(name, weight, gram, result, seconds), torch.from_dlpack(dense)


class _Clock:
    """Seconds by stage."""

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.compute.wait()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin
