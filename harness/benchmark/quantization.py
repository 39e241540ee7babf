"""Time quantization at the size of real models: random layers of their shapes, created and freed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from harness.backends import Backend
from harness.benchmark.shapes import SHAPES, make_model, random_reader
from harness.calibration.capture import capture_inputs
from harness.calibration.fits import FittedMatrix
from harness.calibration.layerwise import fit_layers
from harness.calibration.methods import ternarizer
from harness.compute import Compute, seconds_of
from harness.machine import peak_memory
from harness.models.decoder import DecoderLayers
from harness.models.streamed import attach_empty_layers
from harness.ternary.writing import CheckpointWriter
from reference.types import TernaryConfig


@dataclass(frozen=True)
class Scale:
    """Size of a run of `quantize_shape`; `layers` is the number of layers to create, None for all."""

    shape: str
    layers: int | None = None
    nsamples: int = 128
    seqlen: int = 2048


def quantize_shape(
    scale: Scale,
    backend: Backend,
    compute: Compute,
    config: TernaryConfig = TernaryConfig(),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the whole pipeline on random layers: forward passes, Gram matrices, fits, writing the checkpoint.

    Parameters
    ----------
    scale : Scale
        Shape of the model, and number of layers and windows.
    backend, compute
        Backend that fits matrices, and device that runs layers.
    config : TernaryConfig
        Settings of the fits.
    say : callable
        Prints a line after every layer.

    Returns
    -------
    dict
        Seconds by stage, per layer and for the whole model (extrapolated from the measured layers); for
        comparison, seconds of two plain forward passes, and of column-by-column GPTQ on the first layer;
        and peak memory.
    """
    method = ternarizer(backend, compute, config)
    _warm_up(method, compute, config)
    if compute.memory is not None:
        torch.cuda.reset_peak_memory_stats(compute.device)
    begin = time.perf_counter()
    model, decoder, depth = random_model(scale, compute)
    windows = torch.randint(model.config.vocab_size, (scale.nsamples, scale.seqlen))
    passage = capture_inputs(model, decoder, windows, compute)
    passage.place()
    count = len(passage.calls)
    before = time.perf_counter() - begin

    layers: list[dict[str, float]] = []
    plain_gptq = 0.0
    with TemporaryDirectory() as folder, CheckpointWriter(Path(folder), count, backend) as writer:
        for layer in fit_layers(passage, method):
            begin = time.perf_counter()
            writer.add({}, {matrix.name: matrix.result for matrix in layer.matrices})
            seconds = {**layer.seconds, "writing": time.perf_counter() - begin}
            if not layers:
                plain_gptq = seconds_of(partial(_column_gptq_of_all, layer.matrices), compute, warm_up=False)
            layers.append(seconds)
            say(
                f"{scale.shape} layer {len(layers)}/{count}: "
                + ", ".join(f"{stage} {spent:.2f}" for stage, spent in seconds.items())
                + " s"
            )
            del layer
        written = sum(file.stat().st_size for file in writer.folder.iterdir())
    typical = {stage: median(layer[stage] for layer in layers) for stage in layers[0]}
    total = before + sum(sum(layer.values()) for layer in layers)
    per_layer = sum(typical.values())
    return {
        "shape": scale.shape,
        "tokens": f"{scale.nsamples} x {scale.seqlen}",
        "backend": backend.name,
        "device": compute.describe(),
        "layers_measured": len(layers),
        "layers_of_the_model": depth,
        "seconds_before_the_layers": round(before, 3),
        "seconds_a_layer": {stage: round(spent, 4) for stage, spent in typical.items()},
        "seconds_a_layer_in_all": round(per_layer, 4),
        "seconds_of_the_model": round(total + per_layer * (depth - len(layers)), 2),
        "extrapolated": len(layers) < depth,
        "seconds_of_two_plain_passes_of_the_model": round(2 * typical["outputs"] * depth, 2),
        "seconds_a_layer_of_column_by_column_gptq": round(plain_gptq, 3),
        "bytes_a_layer": written // len(layers),
        "hidden_states_on": str(passage.hidden[0].device),
        "peak_memory_gb": round(peak_memory() / 1e9, 2),
        "peak_device_memory_gb": round(compute.peak_memory() / 1e9, 2),
    }


def random_model(scale: Scale, compute: Compute) -> tuple[Any, DecoderLayers, int]:
    """Make a model of a shape with layers created on demand; also return the full number of layers."""
    depth = SHAPES[scale.shape].layers
    layers = SHAPES[scale.shape].depth(scale.layers)
    model = make_model(scale.shape, layers, torch.bfloat16, max(2048, scale.seqlen))
    empty = attach_empty_layers(model, layers)
    shapes = {f"{empty.prefix}.{name}": t.shape for name, t in empty.layers.state_dict().items()}
    decoder = DecoderLayers(empty.prefix, empty.layers, empty.linears, random_reader(shapes, compute.device))
    return model, decoder, depth


def column_gptq(
    W: torch.Tensor, C: torch.Tensor, group_size: int = 128, damping: float = 0.01
) -> torch.Tensor:
    """GPTQ at 2 bits, column by column as in its paper, to compare speed.

    Parameters
    ----------
    W : (n, m) tensor
        Weights.
    C : (m, m) float64 tensor
        Gram matrix of their inputs, without dead inputs.
    group_size : int
        Columns that share a grid; later columns are updated once per group.
    damping : float
        Fraction of mean(diag C) added to the diagonal.

    Returns
    -------
    (n, m) tensor
        The result of `reference.baselines.gptq`, which computes in float64.
    """
    W = W.clone()
    H = C + damping * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inverse, upper=True).to(W.dtype)
    W_hat = torch.empty_like(W)
    for first in range(0, W.shape[1], group_size):
        last = min(first + group_size, W.shape[1])
        group = W[:, first:last]
        low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
        step = (high - low) / 3
        step = torch.where(step == 0, 1, step)
        zero = torch.round(-low / step)
        errors = torch.empty_like(group)
        for j in range(first, last):
            W_hat[:, j] = step * ((torch.round(W[:, j] / step) + zero).clamp(0, 3) - zero)
            errors[:, j - first] = (W[:, j] - W_hat[:, j]) / U[j, j]
            W[:, j + 1 : last] -= torch.outer(errors[:, j - first], U[j, j + 1 : last])
        W[:, last:] -= errors @ U[first:last, last:]
    return W_hat


def _column_gptq_of_all(matrices: list[FittedMatrix]) -> None:
    for matrix in matrices:
        column_gptq(matrix.weight.float(), matrix.gram)


def _warm_up(method: Callable[..., Any], compute: Compute, config: TernaryConfig) -> None:
    """Compile kernels and create library handles before the measurement."""
    W = torch.randn(64, 2 * config.block_size, device=compute.device)
    method(W, (W.T @ W).double())
    compute.wait()
