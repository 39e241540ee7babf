"""Compare the paper's ablations and 2-bit baselines on the same text; summarize runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.calibration.methods import FitError
from harness.comparison.measure import Comparison
from harness.comparison.methods import METHODS
from harness.progress import Say, say_on_stdout
from harness.quantize.options import Options


def summarize(record: dict[str, Any]) -> dict[str, Any]:
    """Summarize the report of a run: seconds by stage, memory, error, perplexity.

    ``ratio`` compares the time of the run with two plain forward passes of the calibration tokens. The
    stage ``outputs`` is one such pass: float32, all windows, no Gram matrices. Calibration needs two
    passes even if everything else were free. The stages alternate, so a busy machine slows all alike.
    """
    seconds = dict(record["seconds"])
    total = seconds["load"] + seconds.pop("layers")
    for layer in record["layers"]:
        for stage, spent in layer["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    passes = 2 * seconds["outputs"]
    calibration = record["calibration"]
    return {
        "model": record["model"],
        "calibration": f"{calibration['nsamples']} x {calibration['seqlen']} tokens; {calibration['text']}",
        "seconds_without_evaluation": round(total, 1),
        "seconds_of_two_plain_passes": round(passes, 1),
        "ratio": round(total / passes, 3),
        "seconds_by_stage": {stage: round(spent, 1) for stage, spent in seconds.items()},
        "peak_memory_gb": round(record["peak_memory_bytes"] / 1e9, 2),
        "bits_per_weight": round(record["bits_per_weight"], 3),
        "mean_relative_output_error": record["mean_relative_output_error"],
        "perplexity": record["perplexity"],
    }


def compare_methods(
    options: Options,
    methods: list[str],
    texts: list[str],
    save: Callable[[dict[str, Any]], None],
    say: Say = say_on_stdout,
) -> dict[str, dict[str, Any]]:
    """Measure every method on every text, with everything else equal.

    Parameters
    ----------
    options : Options
        Model and calibration, and the windows of the evaluation.
    methods : list of str
        Keys of `METHODS`.
    texts : list of str
        Texts to measure on. The perplexity on the first is the perplexity of a method in its plot.
    save : callable
        Receives the results so far after every method: an interrupted run loses only one method.
    say : callable
        Prints a line for the user.

    Returns
    -------
    dict
        By method: bits per weight, perplexity, mean relative output error, seconds of the layers, and for
        every text perplexity and divergence from the original.
    """
    comparison = Comparison.of(options, texts)
    before = comparison.perplexities()
    first, *_ = before.values()
    results: dict[str, dict[str, Any]] = {
        "original": {
            "perplexity": first.value,
            "texts": {label: {"perplexity": found.value} for label, found in before.items()},
        },
        "protocol": {
            "evaluation": first.protocol,
            "texts": {label: found.protocol for label, found in before.items()},
        },
    }
    with TemporaryDirectory() as folder:
        for name in methods:
            method = METHODS[name]
            say(method.words)
            try:
                record, model = comparison.quantize(method, Path(folder) / "out")
            except FitError as error:  # a method that diverges is also a result
                results[method.words] = {"error": str(error)}
            else:
                results["protocol"].setdefault("calibration", _shared(record["calibration"]))
                on_texts = {
                    label: {"perplexity": perplexity.value, **asdict(divergence)}
                    for label, (perplexity, divergence) in comparison.divergences(model).items()
                }
                del model  # the next one is loaded without it
                results[method.words] = {
                    "bits_per_weight": round(record["bits_per_weight"], 3),
                    "perplexity": next(iter(on_texts.values()))["perplexity"],
                    "mean_relative_output_error": record["mean_relative_output_error"],
                    "seconds_of_layers": round(record["seconds"]["layers"], 1),
                    "texts": on_texts,
                }
            save(results)
            say(f"  {results[method.words]}")
    return results


def _shared(calibration: dict[str, Any]) -> dict[str, Any]:
    """What all methods of a comparison share of the calibration."""
    own = ("targets", "strength", "token_weights", "true_sequential", "inputs_checksum")
    return {name: value for name, value in calibration.items() if name not in own}
