"""Tokens per second of a model, dense or with ternary layers of random weights: values change no speed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer

from harness.compute import Compute
from harness.hf import swap
from harness.ternary.format import StoredLayers
from harness.ternary.linear import TernaryLinear
from reference.types import TernaryConfig

REPEATS = 5


@dataclass(frozen=True)
class Lengths:
    """Tokens of prefill and decoding, by default as in the paper's Fig. 4."""

    prefill: int = 128
    decode: int = 256


def make_ternary(model: nn.Module, names: list[str], config: TernaryConfig, dtype: torch.dtype) -> None:
    """Replace linear layers of a model by ternary ones of the settings' block size, grid and order."""
    unpermuted = names if config.reorder == "none" else []
    stored = StoredLayers(config.block_size, config.grid, names, unpermuted, None, coded=[])
    for name in names:
        swap(model, name, stored, dtype)


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Fill a module with random weights, scaled so that activations stay finite."""
    if isinstance(module, TernaryLinear):
        m = module.in_features
        module.trits.random_(0, 3**5)
        # The last byte is padded with t = 0: digit 1 in every position beyond the row.
        used = m - 5 * (module.trits.shape[1] - 1)
        module.trits[:, -1] = module.trits[:, -1] % 3**used + (3**5 - 3**used) // 2
        if module.row_factor is None or module.scale_factor is None:
            module.scale.fill_(m**-0.5)
            if module.shift is not None:
                module.shift.normal_(std=0.1 * m**-0.5)
        else:
            module.row_factor.fill_(m**-0.5)
            module.scale.fill_(100)
            module.scale_factor.fill_(0.01)
            if module.shift is not None and module.shift_factor is not None:
                module.shift.random_(-20, 21)
                module.shift_factor.fill_(0.01)
        if module.permutation is not None:
            module.permutation.copy_(torch.randperm(m, device=module.trits.device))
    elif isinstance(module, nn.Linear):
        module.weight.normal_(std=module.in_features**-0.5)
    else:  # norms
        for parameter in module.parameters(recurse=False):
            parameter.fill_(1)


class _Stamps(BaseStreamer):
    """Record the times of the prompt and of every new token.

    Decoding is timed within a run. The difference between a long and a short run would be mostly noise for
    few tokens, and could be negative.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Take tokens; they are on the host already, so the device has finished them."""
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: no output is buffered."""


def generation_rates(model: Any, compute: Compute, lengths: Lengths) -> dict[str, float]:
    """Measure tokens per second of ``prefill``, ``decode`` and ``both`` at batch size 1, and ``bytes``.

    Figures are medians over `REPEATS` runs with a static cache, after one that compiles.
    """
    prompt = torch.randint(0, model.config.vocab_size, (1, lengths.prefill), device=compute.device)
    tokens = lengths.decode + 1  # prefill yields the first one
    prefill, decode, both = [], [], []
    for _ in range(REPEATS + 1):  # the first run compiles
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
        prefill.append(first - begin)
        decode.append(last - first)
    tensors = (*model.parameters(), *model.buffers())
    return {
        "prefill": rounded(lengths.prefill / median(prefill[1:])),
        "decode": rounded(lengths.decode / median(decode[1:])),
        "both": rounded((lengths.prefill + lengths.decode) / median(both[1:])),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }


def rounded(figure: float) -> float:
    """Round a figure to five digits."""
    return float(f"{figure:.5g}")
