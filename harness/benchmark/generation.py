"""Tokens a second of models of real shapes, dense and ternary, side by side in one run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer

from harness.benchmark.shapes import SHAPES, make_model
from harness.compute import Compute, dtype_name
from harness.hf import swap
from harness.models.streamed import attach_empty_layers
from harness.ternary.format import StoredLayers
from harness.ternary.kernels.launches import use_kernels
from harness.ternary.linear import TernaryLinear

DTYPE = torch.bfloat16


REPEATS = 5


@dataclass(frozen=True)
class Lengths:
    """Tokens that are read and written, as in the paper's Fig. 4."""

    prefill: int = 128
    decode: int = 256


def generation_speed(
    shape: str, compute: Compute, layers: int | None = None, lengths: Lengths = Lengths()
) -> dict[str, Any]:
    """Tokens a second of reading a prompt, of writing after it, and of both, at batch 1.

    Both models are random, run through ``generate`` with a static cache, and are compiled by it with CUDA
    graphs where there is a device: what writes tokens; transformers may read the prompt without.

    Parameters
    ----------
    shape : str
        One of `harness.scale.SHAPES`.
    compute : Compute
        Where they run.
    layers : int, optional
        Decoder layers; all if left out.
    lengths : Lengths
        Tokens of the prompt, and tokens written.

    Returns
    -------
    dict
        For the ``dense`` and the ``ternary`` model: tokens a second of ``prefill``, ``decode`` and ``both``,
        and bytes of the model; and the ratios of these.
    """
    figures = {
        kind: _speed(random_network(shape, layers, kind == "ternary", compute), compute, lengths)
        for kind in ("dense", "ternary")
    }
    dense, ternary = figures["dense"], figures["ternary"]
    return {
        "shape": shape,
        "layers": SHAPES[shape].depth(layers),
        "layers_of_the_model": SHAPES[shape].layers,
        "tokens": f"{lengths.prefill} read, {lengths.decode} written",
        "dtype": dtype_name(DTYPE),
        "device": compute.describe(),
        **figures,
        "ternary_over_dense": {figure: _rounded(ternary[figure] / dense[figure]) for figure in dense},
    }


def random_network(shape: str, layers: int | None, ternary: bool, compute: Compute) -> Any:
    """A model of a shape with random weights, made on the device it runs on."""
    depth = SHAPES[shape].depth(layers)
    model = make_model(shape, depth, DTYPE)
    decoder = attach_empty_layers(model, depth)
    if ternary:
        names = list(decoder.named_linears())
        stored = StoredLayers(128, "float16", names, unpermuted=[], shared_inputs=None, coded=[])
        for name in names:
            swap(model, name, stored, DTYPE)
    for layer in decoder.layers:
        layer.to_empty(device=compute.device)
        for module in layer.modules():
            fill(module)
    model.to(compute.device)
    if ternary and compute.device.type == "cuda":
        use_kernels(model)
    return model


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Random weights of a size that keeps activations finite."""
    if isinstance(module, TernaryLinear):
        m = module.in_features
        module.trits.random_(0, 3**5)
        # The filling of the last byte is t = 0: the digit 1 in every place beyond the row.
        used = m - 5 * (module.trits.shape[1] - 1)
        module.trits[:, -1] = module.trits[:, -1] % 3**used + (3**5 - 3**used) // 2
        module.scale.fill_(m**-0.5)
        module.shift.normal_(std=0.1 * m**-0.5)
        if module.permutation is not None:
            module.permutation.copy_(torch.randperm(m, device=module.trits.device))
        module.keep_dense(module.trits.device.type == "cpu")
    elif isinstance(module, nn.Linear):
        module.weight.normal_(std=module.in_features**-0.5)
    else:  # norms
        for parameter in module.parameters(recurse=False):
            parameter.fill_(1)


class _Stamps(BaseStreamer):
    """Notes when the prompt was taken, and when each token was there.

    Writing is timed within a run: the difference of a long run and a short one is noise where few tokens
    are written, and may be below 0.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with what has been copied to the host, so a device is done with it."""
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def _speed(model: Any, compute: Compute, lengths: Lengths) -> dict[str, float]:
    prompt = torch.randint(0, model.config.vocab_size, (1, lengths.prefill), device=compute.device)
    tokens = lengths.decode + 1  # the first one comes with the prompt
    reading, writing, both = [], [], []
    for _ in range(REPEATS + 1):  # the first compiles
        compute.wait()
        stamps = _Stamps()
        begin = time.perf_counter()
        with torch.no_grad():
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                cache_implementation="static",
                pad_token_id=0,
                streamer=stamps,
            )
        compute.wait()
        both.append(time.perf_counter() - begin)
        _, first, *_, last = stamps.seconds
        reading.append(first - begin)
        writing.append(last - first)
    tensors = (*model.parameters(), *model.buffers())
    return {
        "prefill": _rounded(lengths.prefill / median(reading[1:])),
        "decode": _rounded(lengths.decode / median(writing[1:])),
        "both": _rounded((lengths.prefill + lengths.decode) / median(both[1:])),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }


def _rounded(figure: float) -> float:
    return float(f"{figure:.5g}")
