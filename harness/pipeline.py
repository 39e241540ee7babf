"""Calibration layer by layer: inputs, Gram matrices, ternarization, and on to the next layer.

Every decoder layer sees what the layers before it, already ternarized, give it. One layer at a time
is held in float32 and computed in it; the model itself stays in its own dtype. Hidden states between
layers are kept in the model's dtype. Gram products are float32 over CHUNK_TOKENS tokens and summed
in float64.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import nn

from harness.cli import UserError
from harness.models import DecoderLayers
from reference.types import TernaryMatrix

CHUNK_TOKENS = 8192

# Maps weights (n, m) and the Gram matrix (m, m) of their inputs, both float64, to the matrix that takes
# their place: a TernaryMatrix, or for the baselines the dense (n, m) array.
Method = Callable[[np.ndarray, np.ndarray], Any]


class FitError(UserError):
    """A matrix that cannot be quantized by the method asked for."""


@dataclass(frozen=True)
class LayerCall:
    """What the model passes to a decoder layer beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Run the layer; floating-point arguments (masks, rotary tables) follow the hidden states' dtype."""
        args, kwargs = _cast((self.args, self.kwargs), hidden.dtype)
        output = layer(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class FittedMatrix:
    """One matrix of a layer after quantization."""

    name: str  # in the whole model
    weight: np.ndarray  # the original, float64
    gram: np.ndarray
    result: Any  # TernaryMatrix, or for the baselines the dense (n, m) array
    seconds: float


@dataclass(frozen=True)
class FittedLayer:
    """One decoder layer after quantization; `seconds` of its inputs, fits and outputs."""

    matrices: list[FittedMatrix]
    seconds: dict[str, float]


@torch.no_grad()
def capture_inputs(
    model: nn.Module, layers: nn.ModuleList, windows: torch.Tensor
) -> tuple[list[torch.Tensor], list[LayerCall]]:
    """The hidden states that reach the first layer for every window, and how every layer is called.

    Parameters
    ----------
    model : nn.Module
        A causal language model.
    layers : nn.ModuleList
        Its decoder layers.
    windows : (samples, seqlen) int64 tensor
        Token ids.

    Returns
    -------
    hidden : list of (1, seqlen, width) tensors
    calls : list of LayerCall
        One a layer, from the first window: windows are of one length and without padding, so masks
        and positions are the same for all of them.

    Raises
    ------
    UserError
        If the model does not simply pass the hidden states from layer to layer.
    """
    first, calls = _record_pass(model, layers, windows[0])
    if len(windows) > 1:
        _, others = _record_pass(model, layers, windows[-1])
        for index, (call, other) in enumerate(zip(calls, others, strict=True)):
            if not _same((call.args, call.kwargs), (other.args, other.kwargs)):
                raise UserError(
                    f"decoder layer {index} of {type(model).__name__} is given more that depends on the text "
                    "than the hidden states; such models cannot be calibrated layer by layer"
                )

    hidden = [first]

    def stop(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])
        raise _Captured

    handle = layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for window in windows[1:]:
            try:
                model(window[None], use_cache=False)
            except _Captured:
                continue
    finally:
        handle.remove()
    return hidden, calls


@torch.no_grad()
def quantize_layers(
    decoder: DecoderLayers,
    hidden: list[torch.Tensor],
    calls: list[LayerCall],
    method: Method,
    *,
    true_sequential: bool = False,
    progress: Callable[[int, str], None] = lambda steps, stage: None,
) -> Iterator[FittedLayer]:
    """Quantize the decoder layers in place, one after the other, yielding each when it is done.

    Parameters
    ----------
    decoder : DecoderLayers
        The layers; their weights are replaced by the dequantized ones in the model's dtype.
    hidden : list of (1, seqlen, width) tensors
        Inputs of the first layer; overwritten by the outputs of every layer in turn.
    calls : list of LayerCall
        How each layer is called.
    method : callable
        Maps weights and Gram matrix, both float64, to what takes the weights' place.
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
    for index, (layer, call) in enumerate(zip(decoder.layers, calls, strict=True)):
        working = copy.deepcopy(layer).float()
        linears = {name: cast(nn.Linear, working.get_submodule(name)) for name in decoder.linears[index]}
        groups = _input_groups(working, linears, hidden[0], call)
        matrices: list[FittedMatrix] = []
        clock = _Clock()
        for batch in [[group] for group in groups] if true_sequential else [groups]:
            with clock("inputs"):
                grams = _collect_grams(working, linears, batch, hidden, call, lambda: progress(1, "inputs"))
            for group, gram in zip(batch, grams, strict=True):
                if not np.isfinite(gram).all():
                    name = decoder.full_name(index, group[0])
                    raise FitError(f"{name}: its inputs are not finite on the calibration text")
            with clock("fits"):
                jobs = [
                    (decoder.full_name(index, name), decoder.linears[index][name], gram)
                    for group, gram in zip(batch, grams, strict=True)
                    for name in group
                ]
                progress(0, ", ".join(name.rpartition(".")[2] for name, _, _ in jobs))
                matrices += _quantize_together(jobs, method)
                for group in batch:
                    for name in group:
                        linears[name].weight.data = decoder.linears[index][name].weight.data.float()
        with clock("outputs"):
            for position, states in enumerate(hidden):
                hidden[position] = call(working, states.float()).to(states.dtype)
                progress(1, "outputs")
        yield FittedLayer(matrices, clock.seconds)
        # Weights and Gram matrices of a layer in float64 need not live beside those of the next.
        del matrices, grams, jobs


def _quantize_together(jobs: list[tuple[str, nn.Linear, np.ndarray]], method: Method) -> list[FittedMatrix]:
    """Quantize matrices side by side, which keeps all cores busy; BLAS threads share what is left."""
    cores = torch.get_num_threads()
    workers = min(len(jobs), cores)
    # The one that takes longest, by the cube of its columns, must not be the last to start.
    order = sorted(range(len(jobs)), key=lambda i: jobs[i][1].in_features, reverse=True)
    pool = ThreadPoolExecutor(workers)
    try:
        with threadpool_limits(max(1, cores // workers), "blas"):
            running = {i: pool.submit(_quantize, *jobs[i], method) for i in order}
            for future in wait(running.values(), return_when=FIRST_EXCEPTION).done:
                future.result()  # the first failure ends it, whichever matrix it is
            return [running[i].result() for i in range(len(jobs))]
    finally:
        # After Ctrl-C or a failure the matrices that have not begun are not begun.
        pool.shutdown(cancel_futures=True)


def _quantize(name: str, linear: nn.Linear, gram: np.ndarray, method: Method) -> FittedMatrix:
    weight = linear.weight.detach().double().numpy()
    begin = time.perf_counter()
    try:
        result = method(weight, gram)
    except ValueError as error:  # numpy's LinAlgError is one
        raise FitError(f"{name}: {error}") from None
    seconds = time.perf_counter() - begin
    dense = result.dequantize() if isinstance(result, TernaryMatrix) else result
    linear.weight.data = torch.from_numpy(dense).to(linear.weight.dtype)
    return FittedMatrix(name, weight, gram, result, seconds)


def _input_groups(
    layer: nn.Module, linears: dict[str, nn.Linear], hidden: torch.Tensor, call: LayerCall
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
        call(layer, hidden.float())
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
    step: Callable[[], None],
) -> list[np.ndarray]:
    """One Gram matrix for every group, over all windows."""
    sums = [GramSum(linears[group[0]].in_features) for group in groups]

    def add(total: GramSum) -> Callable[..., None]:
        return lambda module, args: total.add(args[0].reshape(-1, total.columns))

    with _pre_hooks({linears[group[0]]: add(total) for group, total in zip(groups, sums, strict=True)}):
        for states in hidden:
            call(layer, states.float())
            step()
    return [total.finish() for total in sums]


class GramSum:
    """Sum of XᵀX over many rows: float32 products of a chunk, chunks summed in float64.

    Parameters
    ----------
    columns : int
        Width m of the inputs.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._total = torch.zeros(columns, columns, dtype=torch.float64)
        self._chunk = torch.zeros(columns, columns)
        self._rows = 0

    def add(self, X: torch.Tensor) -> None:
        """Add the rows of X, (rows, m) float32."""
        for part in X.split(CHUNK_TOKENS):
            if self._rows + len(part) > CHUNK_TOKENS:
                self._flush()
            self._chunk.addmm_(part.T, part)
            self._rows += len(part)

    def finish(self) -> np.ndarray:
        """The symmetric (m, m) float64 sum."""
        self._flush()
        # The product of a matrix with itself is symmetric only to rounding.
        return ((self._total + self._total.T) / 2).numpy()

    def _flush(self) -> None:
        self._total += self._chunk
        self._chunk.zero_()
        self._rows = 0


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

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin


class _Captured(Exception):
    """The first decoder layer was reached; the rest of the pass is not needed."""


def _record_pass(
    model: nn.Module, layers: nn.ModuleList, window: torch.Tensor
) -> tuple[torch.Tensor, list[LayerCall]]:
    """The hidden states that reach the first layer, and every layer's call, in a pass of the whole model."""
    calls: list[LayerCall] = []
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        inputs.append(args[0] if args else kwargs.pop("hidden_states"))
        calls.append(LayerCall(args[1:], kwargs))

    def leave(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    try:
        model(window[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    chained = len(calls) == len(layers) and all(
        a is b or torch.equal(a, b) for a, b in zip(outputs, inputs[1:], strict=False)
    )
    if not chained:
        raise UserError(
            f"{type(model).__name__} does more between its decoder layers than pass the hidden states on; "
            "such models cannot be calibrated layer by layer"
        )
    return inputs[0], calls


def _same(a: Any, b: Any) -> bool:
    """Whether two calls pass the same; what holds no tensor is taken to be the same."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return not (isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(v, dtype) for v in value)
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return value
