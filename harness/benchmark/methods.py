"""Compare the paper's ablations and 2-bit baselines on the same text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.calibration.methods import BASELINES, FitError
from harness.errors import UserError
from harness.progress import Say, say_on_stderr, say_on_stdout
from harness.quantize.options import NO_EVALUATION, PT2_LLM, Options
from harness.quantize.run import quantize
from reference.types import TernaryConfig

NO_ORDER = TernaryConfig(reorder="none")


@dataclass(frozen=True)
class Method:
    """A method to compare: its name in the results, and the settings of its run."""

    words: str
    method: str = PT2_LLM
    config: TernaryConfig = field(default_factory=TernaryConfig)


METHODS: dict[str, Method] = {
    "pt2-llm": Method("SSR + ITF + AGA (PT²-LLM)"),
    "int8-grid": Method("SSR + ITF + AGA, alpha and mu in 8 bits", config=TernaryConfig(grid="int8")),
    "conditional": Method("SSR + ITF + conditional AGA", config=TernaryConfig(aga="conditional")),
    "hessian": Method("Hessian order + ITF + AGA", config=TernaryConfig(reorder="hessian")),
    "random": Method("random order + ITF + AGA", config=TernaryConfig(reorder="random")),
    "no-order": Method("ITF + AGA", config=NO_ORDER),
    "no-compensation": Method("ITF + AGA, no compensation", config=replace(NO_ORDER, compensation=False)),
    "itf-only": Method("ITF", config=replace(NO_ORDER, aga="none")),
    "aga-only": Method("AGA", config=replace(NO_ORDER, itf=False)),
    "init-only": Method("initialization only", config=replace(NO_ORDER, itf=False, aga="none")),
    "eq13": Method("SSR + ITF + Eq. 13 as printed", config=TernaryConfig(aga="printed")),
    **{name: Method(f"{name} ({what})", name) for name, what in BASELINES.items()},
}


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
    save: Callable[[dict[str, Any]], None],
    say: Say = say_on_stdout,
) -> dict[str, dict[str, Any]]:
    """Measure perplexity and mean relative output error of every method, with everything else equal.

    `save` receives the results so far after every method; an interrupted run loses only one method.
    """
    if options.evaluation == NO_EVALUATION:
        raise UserError("methods are compared by perplexity, which needs a text; pass one with --eval")
    results: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        for name in methods:
            method = METHODS[name]
            say(method.words)
            try:
                record = quantize(
                    replace(
                        options,
                        method=method.method,
                        config=method.config,
                        out=Path(folder) / "out" if method.method == PT2_LLM else None,
                        force=True,
                        measure_original="original" not in results,
                    ),
                    say=say_on_stderr,
                    say_result=lambda line: None,
                )
            except FitError as error:  # a method that diverges is also a result
                results[method.words] = {"error": str(error)}
            else:
                before = record["perplexity"].get("before")
                if before is not None:
                    results["original"] = {"perplexity": before["value"]}
                    results["protocol"] = {
                        "calibration": record["calibration"],
                        "evaluation": before["protocol"],
                    }
                results[method.words] = {
                    "bits_per_weight": round(record["bits_per_weight"], 3),
                    "perplexity": record["perplexity"]["after"]["value"],
                    "mean_relative_output_error": record["mean_relative_output_error"],
                }
            save(results)
            say(f"  {results[method.words]}")
    return results
