"""Measure what average tokens are worth to experts with few of their own (`harness.calibration.experts`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from harness.backends import load_backend
from harness.benchmark.slices import Slicing, slice_mlps
from harness.calibration.capture import capture_inputs
from harness.calibration.methods import Method, ternarizer
from harness.calibration.owners import own_statistics
from harness.calibration.sums import Statistics
from harness.comparison.methods import METHODS
from harness.compute import Compute, compute_for
from harness.distributed.ranks import ALONE
from harness.models.decoder import find_decoder_layers
from harness.models.experts import family
from harness.models.linearize import linearize
from harness.models.original import Original
from harness.perplexity import cut_windows
from harness.progress import Progress, say_on_stderr
from harness.text import AnyText
from harness.windows import calibration_windows, tokenize

SLICING = Slicing("16 slices, top 1", 16, 1)
# Windows to fit experts to, and tokens per window: 32 and 128 tokens an expert in the mean.
FEW, SEQLEN = (4, 16), 128
# Windows to measure fits on, and tokens per window.
MANY, LONG = 16, 512
# What an expert is fitted to: its own Gram matrix C and a multiple of (m - n) P. The formula has 1 of each.
SUMS = {
    "own tokens alone": (1.0, 0.0),
    "own tokens, a quarter of the average ones": (1.0, 0.25),
    "own tokens and average ones": (1.0, 1.0),
    "own tokens, four times the average ones": (1.0, 4.0),
    "average tokens alone": (0.0, 1.0),
}


@torch.no_grad()
def few_token_errors(
    dense: Original, calibration: AnyText, evaluation: AnyText, methods: list[str]
) -> dict[str, Any]:
    """Fit experts to few tokens in several ways, and measure their outputs on others routed to them.

    The experts read what the MLPs of the dense model read, at a third and at two thirds of its depth.

    Parameters
    ----------
    dense : Original
        A dense model that can be sliced.
    calibration, evaluation : text
        Texts for the fits and for the measurement.
    methods : list of str
        Keys of `METHODS`, whose settings of a single fit are used.

    Returns
    -------
    dict
        By the calibration's size, method and kind of matrix: the squared relative output error of all experts
        together, by what they were fitted to. Experts without tokens, or with as many as columns, are left
        out.
    """
    backend = load_backend("auto")
    compute = compute_for(backend)
    mixture = slice_mlps(dense.model, SLICING)
    linearize(mixture)
    fits = {METHODS[key].words: ternarizer(backend, compute, METHODS[key].config) for key in methods}
    tokens = tokenize(calibration, dense.tokenizer)
    unseen = cut_windows(dense, evaluation, LONG, MANY)[0]
    found: dict[str, Any] = {"experts": SLICING.words, "measured_on": f"{len(unseen)} windows of {LONG}"}
    measured = list(_experts(dense, mixture, unseen, compute))
    for count in FEW:
        windows = calibration_windows(tokens, count, SEQLEN, seed=0)
        totals: dict[str, dict[str, list[tuple[float, float]]]] = {}
        numbers: list[int] = []
        layers = zip(_experts(dense, mixture, windows, compute), measured, strict=True)
        with Progress(f"experts of {count} x {SEQLEN} tokens", len(measured), "layer", say_on_stderr) as step:
            for (weights, own, filled), (_, others, _) in layers:
                for name, weight in weights.items():
                    if name.endswith("down_proj"):
                        numbers.append(own[name].tokens)
                    if 0 < own[name].tokens < len(own[name].gram):
                        parts = own[name].gram, filled[name].gram - own[name].gram
                        for words, method in fits.items():
                            errors = _errors(weight, parts, others[name].gram, method)
                            row = totals.setdefault(f"{words}, {name.rpartition('.')[2]}", {})
                            for fitted_to, pair in errors.items():
                                row.setdefault(fitted_to, []).append(pair)
                step()
        found[f"{count} windows of {SEQLEN}"] = {
            "tokens_of_experts": sorted(numbers),
            **{
                what: {
                    fitted_to: sum(error for error, _ in pairs) / sum(power for _, power in pairs)
                    for fitted_to, pairs in row.items()
                }
                for what, row in totals.items()
            },
        }
    return found


# Of one layer, by the names of the experts' matrices: weights, what their tokens show, the same filled up.
_Layer = tuple[dict[str, torch.Tensor], dict[str, Statistics], dict[str, Statistics]]


def _experts(dense: Original, mixture: Any, windows: torch.Tensor, compute: Compute) -> Iterator[_Layer]:
    """What two layers' experts read in the mixture, where the layers before are those of the dense model."""
    there, here = (
        capture_inputs(model, find_decoder_layers(model), windows, compute)
        for model in (dense.model, mixture)
    )
    depth = len(there.calls)
    for index in range(2 * depth // 3 + 1):
        if index in (depth // 3, 2 * depth // 3):
            here.hidden = there.hidden
            layer = here.enter(index)
            names = [name for name in layer.linears if family(layer.module, name)]
            groups = [[name] for name in names]
            sums = here.collect(layer, groups)
            filled = own_statistics(layer, groups, sums, dict.fromkeys(names, 0), ALONE)
            weights = {name: layer.linears[name].weight for name in names}
            yield weights, {name: replace(known, gram=known.seen) for name, known in filled.items()}, filled
        there.advance(there.enter(index))


def _errors(
    weight: torch.Tensor, parts: tuple[torch.Tensor, torch.Tensor], gram: torch.Tensor, method: Method
) -> dict[str, tuple[float, float]]:
    """Squared error and squared size of a matrix's outputs on other tokens, by what it was fitted to."""
    found = {}
    for words, factors in SUMS.items():
        result = method(weight, factors[0] * parts[0] + factors[1] * parts[1])
        lost = weight.double() - torch.from_dlpack(result.dequantize()).double()
        error, power = (float((rows @ gram * rows).sum()) for rows in (lost, weight.double()))
        found[words] = error, power
    return found
