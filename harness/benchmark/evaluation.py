"""Time the evaluation of a model beside forward passes whose logits nobody reads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from harness import text
from harness.compute import HOST, Compute
from harness.divergence import divergence_on
from harness.models.loading import load_original
from harness.models.original import Original
from harness.perplexity import cut_windows, measure_on
from harness.progress import Say, say_on_stdout

# Passes of a model over the windows that each measurement needs.
PASSES = {"perplexity": 1, "divergence": 2}


def evaluation_speed(
    model: str | None,
    name: str,
    seqlen: int,
    windows: int,
    compute: Compute,
    rounds: int,
    say: Say = say_on_stdout,
) -> dict[str, Any]:
    """Time perplexity, and divergence from itself, of an original model on a text.

    Parameters
    ----------
    model : str, optional
        As for `harness.quantize`.
    name : str
        Name of the text.
    seqlen, windows : int
        Tokens of a window, and number of windows.
    compute : Compute
        Device that runs the model.
    rounds : int
        Measurements of each kind; they alternate, so that a busy machine slows all alike.
    say : callable
        Prints a line after every round.

    Returns
    -------
    dict
        Median seconds of a bare forward pass over the windows and of each measurement, tokenizing included,
        and each measurement's ratio to the bare passes that it needs: the median over rounds.
    """
    original = load_original(model)
    stream = text.read_text(name, text.EVALUATION, None)
    window = seqlen, windows, compute
    measurements: dict[str, Callable[[], object]] = {
        "bare": lambda: _bare_pass(original, cut_windows(original, stream, seqlen, windows)[0], compute),
        "perplexity": lambda: measure_on(original, stream, *window),
        "divergence": lambda: divergence_on(original, original, stream, *window),
    }
    measurements["bare"]()  # loads the weights
    seconds: dict[str, list[float]] = {what: [] for what in measurements}
    for _ in range(rounds):
        for what, run in measurements.items():
            begin = time.perf_counter()
            run()
            compute.wait()
            seconds[what].append(time.perf_counter() - begin)
        say(", ".join(f"{what} {spent[-1]:.2f} s" for what, spent in seconds.items()))
    ratios = {
        what: [spent / (passes * bare) for spent, bare in zip(seconds[what], seconds["bare"], strict=True)]
        for what, passes in PASSES.items()
    }
    return {
        "model": original.name,
        "windows": f"{windows} x {seqlen}",
        "rounds": rounds,
        "seconds": {what: round(statistics.median(spent), 2) for what, spent in seconds.items()},
        "ratio_to_bare_passes": {what: round(statistics.median(r), 3) for what, r in ratios.items()},
    }


@torch.no_grad()
def _bare_pass(original: Original, windows: torch.Tensor, compute: Compute) -> None:
    """Run a model over windows, and drop the logits."""
    original.model.to(compute.device)
    for window in windows:
        original.model(window[None].to(compute.device), use_cache=False)
    original.model.to(HOST)
