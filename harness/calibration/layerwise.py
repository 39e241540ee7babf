"""Calibration layer by layer: inputs, Gram matrices, ternarization, and on to the next layer.

Every decoder layer sees what the layers before it, already ternarized, give it. One layer at a time
is on the device that computes; hidden states between layers are kept in the model's dtype.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from threadpoolctl import threadpool_limits
from torch import nn

from harness.calibration.capture import LayerCall, advance, brought
from harness.calibration.gram import GramSum
from harness.calibration.methods import FitError, Method
from harness.compute import Compute
from harness.errors import UserError
from harness.models.decoder import DecoderLayers, require_finite
from reference.types import TernaryMatrix


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
    """One decoder layer after quantization; `seconds` of its inputs, fits and outputs."""

    matrices: list[FittedMatrix]
    seconds: dict[str, float]


@torch.no_grad()
def quantize_layers(
    decoder: DecoderLayers,
    hidden: list[torch.Tensor],
    calls: list[LayerCall],
    method: Method,
    compute: Compute = Compute(),
    *,
    first: int = 0,
    true_sequential: bool = False,
    progress: Callable[[int, str], None] = lambda steps, stage: None,
) -> Iterator[FittedLayer]:
    """Quantize the decoder layers in place, one after the other, yielding each when it is done.

    Parameters
    ----------
    decoder : DecoderLayers
        The layers; if they are in memory, their weights are replaced by the dequantized ones in the
        model's dtype.
    hidden : list of (1, seqlen, width) tensors
        Inputs of the first layer; overwritten by the outputs of every layer in turn, where they lie.
    calls : list of LayerCall
        How each layer is called.
    method : callable
        Maps weights and Gram matrix to what takes the weights' place.
    compute : Compute
        Where layers run.
    first : int
        Index of the layer to begin with.
    true_sequential : bool
        Whether inputs are collected again inside a layer, after each group of matrices that share
        one, so that o_proj is fitted to what the ternarized q/k/v give it.
    progress : callable
        Called with the number of forward passes of one window just done, and the stage.

    Raises
    ------
    FitError
        If a matrix cannot be quantized or its inputs are not finite; names the matrix.
    UserError
        If a matrix is used more than once in its layer, or not at all.
    """
    for index in range(first, len(calls)):
        call = calls[index].to(compute)
        clock = _Clock(compute)
        with clock("load"):
            working = decoder.working_copy(index, compute)
            if decoder.read is not None:
                for name, parameter in working.named_parameters():
                    require_finite(decoder.full_name(index, name), parameter)
        linears = {name: cast(nn.Linear, working.get_submodule(name)) for name in decoder.linears[index]}
        groups = _input_groups(working, linears, hidden[0], call, compute)
        matrices: list[FittedMatrix] = []
        for batch in [[group] for group in groups] if true_sequential else [groups]:
            with clock("inputs"):
                grams = _collect_grams(
                    working, linears, batch, hidden, call, compute, lambda: progress(1, "inputs")
                )
            with clock("fits"):
                progress(0, ", ".join(name.rpartition(".")[2] for group in batch for name in group))
                by_group = dict(zip(map(tuple, batch), grams, strict=True))
                matrices += _fit(decoder, index, linears, by_group, method, compute)
            del grams, by_group
        with clock("outputs"):
            advance(working, call, hidden, compute, lambda: progress(1, "outputs"))
        yield FittedLayer(matrices, clock.seconds)
        # The weights and Gram matrices of a layer need not live beside those of the next.
        del matrices, working, linears


def _fit(
    decoder: DecoderLayers,
    index: int,
    linears: dict[str, nn.Linear],
    grams: dict[tuple[str, ...], torch.Tensor],
    method: Method,
    compute: Compute,
) -> Iterator[FittedMatrix]:
    """Quantize matrices of a layer, and put the dequantized ones in their place."""
    jobs = []
    for group, gram in grams.items():
        if not torch.isfinite(gram).all():
            name = decoder.full_name(index, group[0])
            raise FitError(f"{name}: its inputs are not finite on the calibration text")
        jobs += [(decoder.full_name(index, name), linears[name].weight.detach(), gram) for name in group]
    names = [name for group in grams for name in group]
    for name, (matrix, dense) in zip(names, _quantize_together(jobs, method, compute), strict=True):
        _put(decoder, index, name, linears[name], dense)
        yield matrix


def _put(decoder: DecoderLayers, index: int, name: str, linear: nn.Linear, dense: torch.Tensor) -> None:
    """Put dense weights in the place of a matrix, in the model and in the layer that is computed with."""
    # What the checkpoint holds is read back in the dtype of the model.
    dense = dense.to(decoder.linears[index][name].weight.dtype)
    decoder.replace(index, name, dense)
    linear.weight.data = dense.to(linear.weight.device, linear.weight.dtype)


@torch.no_grad()
def pass_again(
    decoder: DecoderLayers,
    hidden: list[torch.Tensor],
    calls: list[LayerCall],
    weights: Iterable[dict[str, torch.Tensor]],
    compute: Compute,
) -> Iterator[None]:
    """Take hidden states through layers that have been quantized before, as `quantize_layers` did.

    Parameters
    ----------
    decoder, hidden, calls, compute
        As for `quantize_layers`.
    weights : iterable of dict
        Dense weights by their names in the layer, of every layer from the first.
    """
    for index, (call, layer_weights) in enumerate(zip(calls, weights, strict=False)):
        working = decoder.working_copy(index, compute)
        for name, dense in layer_weights.items():
            _put(decoder, index, name, cast(nn.Linear, working.get_submodule(name)), dense)
        advance(working, call.to(compute), hidden, compute)
        compute.wait()
        yield


def _quantize_together(
    jobs: list[tuple[str, torch.Tensor, torch.Tensor]], method: Method, compute: Compute
) -> Iterator[tuple[FittedMatrix, torch.Tensor]]:
    """Quantize matrices side by side, which keeps all cores busy; BLAS threads share what is left."""
    if compute.device.type == "cuda":  # which one matrix keeps busy
        yield from (_quantize(*job, method) for job in jobs)
        return
    cores = torch.get_num_threads()
    workers = min(len(jobs), cores)
    # The one that takes longest, by the cube of its columns, must not be the last to start.
    order = sorted(range(len(jobs)), key=lambda i: len(jobs[i][2]), reverse=True)
    pool = ThreadPoolExecutor(workers)
    try:
        with threadpool_limits(max(1, cores // workers), "blas"):
            running = {i: pool.submit(_quantize, *jobs[i], method) for i in order}
            for future in wait(running.values(), return_when=FIRST_EXCEPTION).done:
                future.result()  # the first failure ends it, whichever matrix it is
            yield from (running[i].result() for i in range(len(jobs)))
    finally:
        # After Ctrl-C or a failure the matrices that have not begun are not begun.
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


def _input_groups(
    layer: nn.Module,
    linears: dict[str, nn.Linear],
    hidden: torch.Tensor,
    call: LayerCall,
    compute: Compute,
) -> list[list[str]]:
    """Names of the matrices that read one and the same tensor, in the order they are computed."""
    readers: dict[int, list[str]] = {}
    kept = []  # inputs stay alive, so that no two share an address

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            kept.append(args[0])
            readers.setdefault(id(args[0]), []).append(name)

        return hook

    with _pre_hooks({linears[name]: note(name) for name in linears}):
        call(layer, brought(hidden, compute))
    groups = list(readers.values())
    names = [name for group in groups for name in group]
    idle = sorted(set(linears) - set(names))
    if idle or len(names) != len(set(names)):
        culprit = idle[0] if idle else max(names, key=names.count)
        times = "not" if idle else "more than once"
        raise UserError(
            f"{culprit} is {times} used in a pass through its decoder layer; it cannot be calibrated"
        )
    return groups


def _collect_grams(
    layer: nn.Module,
    linears: dict[str, nn.Linear],
    groups: list[list[str]],
    hidden: list[torch.Tensor],
    call: LayerCall,
    compute: Compute,
    step: Callable[[], None],
) -> list[torch.Tensor]:
    """One Gram matrix for every group, over all windows."""
    sums = [GramSum(linears[group[0]].in_features, compute.device) for group in groups]

    def add(total: GramSum) -> Callable[..., None]:
        return lambda module, args: total.add(args[0].reshape(-1, total.columns))

    with _pre_hooks({linears[group[0]]: add(total) for group, total in zip(groups, sums, strict=True)}):
        for states in hidden:
            call(layer, brought(states, compute))
            step()
    return [total.finish() for total in sums]


@contextmanager
def _pre_hooks(hooks: dict[nn.Module, Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
