"""Compare the paper's ablations and 2-bit baselines on the same text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import text
from harness.calibration.methods import BASELINES, FitError
from harness.compute import default_compute
from harness.divergence import divergence_on, require_comparable
from harness.errors import UserError
from harness.models.loading import load_original
from harness.models.original import Original
from harness.perplexity import measure_on
from harness.progress import Say, say_on_stderr, say_on_stdout
from harness.quantize.options import NO_EVALUATION, OUTPUTS, PT2_LLM, RECIPES, STREAM, WEIGHTS, Options
from harness.quantize.run import quantize
from reference.types import BEST, TernaryConfig

NO_ORDER = TernaryConfig(reorder="none")
DAMPED = replace(NO_ORDER, damping=BEST.damping)
FED = replace(DAMPED, aga="conditional", feed_forward=True)


@dataclass(frozen=True)
class Method:
    """A method to compare: its name in the results, and the settings of its run."""

    words: str
    method: str = PT2_LLM
    config: TernaryConfig = field(default_factory=TernaryConfig)
    targets: str = WEIGHTS
    strength: float = 1.0
    token_weights: bool = False
    true_sequential: bool = False

    def options(self, options: Options, out: Path | None) -> Options:
        """The options of a run by this method."""
        own = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name != "words"}
        return replace(options, **own, out=out if self.method == PT2_LLM else None)


def _best(words: str, strength: float = 1.0, **config: Any) -> Method:
    return Method(words, PT2_LLM, replace(RECIPES["best"].config, **config), STREAM, strength, True, True)


_GPTQ_BEST = "gptq-2bit-best"

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
    # The recipe beyond the paper, one step after the other.
    "pt2-llm-targets": Method(
        "PT²-LLM with targets", targets=STREAM, token_weights=True, true_sequential=True
    ),
    "damped": Method(f"ITF + AGA, damping {DAMPED.damping}", config=DAMPED),
    "fed": Method("+ conditional AGA, rounding fed forward", config=FED),
    "joint": Method("+ joint grid", config=replace(FED, refinement="grid")),
    "descent": Method("+ descent on trits", config=BEST),
    "sequential": Method("+ inputs collected again inside a layer", config=BEST, true_sequential=True),
    "outputs": Method("+ targets: outputs", config=BEST, true_sequential=True, targets=OUTPUTS),
    "stream": Method("+ targets: residual stream", config=BEST, true_sequential=True, targets=STREAM),
    "token-weights": _best("+ token weights", block_size=128, grid="float16"),
    "best": _best("+ blocks of 64, alpha and mu in 8 bits (best)"),
    "best-strength-0.5": _best("best, strength 0.5", 0.5),
    "best-strength-0.75": _best("best, strength 0.75", 0.75),
    "best-damping-0.03": _best("best, damping 0.03", damping=0.03),
    "best-damping-0.1": _best("best, damping 0.1", damping=0.1),
    "best-damping-0.6": _best("best, damping 0.6", damping=0.6),
    "best-32": _best("best, blocks of 32", block_size=32),
    "best-128": _best("best, blocks of 128", block_size=128),
    "best-256": _best("best, blocks of 256", block_size=256),
    **{
        f"best-symmetric-{k}": _best(f"best, mu = 0, blocks of {k}", block_size=k, shift="none")
        for k in (64, 128, 256)
    },
    "gptq-2bit-best-targets": Method(
        f"{_GPTQ_BEST} with the targets of best",
        _GPTQ_BEST,
        DAMPED,
        targets=STREAM,
        token_weights=True,
        true_sequential=True,
    ),
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
    if NO_EVALUATION in texts:
        raise UserError("methods are compared by perplexity, which needs a text; pass one with --eval")
    streams = {name: text.read_text(name, text.EVALUATION, options.text_column) for name in texts}
    window = options.evaluation_seqlen, options.evaluation_windows
    original = load_original(options.model, options.gguf_dtype, options.trust_remote_code)
    require_comparable(original, original)
    compute = default_compute()

    def measure(model: Original) -> dict[str, dict[str, Any]]:
        found = (divergence_on(original, model, stream, *window, compute) for stream in streams.values())
        return {
            label: {"perplexity": perplexity.value, **asdict(divergence)}
            for label, (perplexity, divergence) in zip(labels, found, strict=True)
            if perplexity is not None  # as it is of a language model, which `measure_on` has seen to
        }

    before = [measure_on(original, stream, *window, compute) for stream in streams.values()]
    labels = [found.protocol.partition(":")[0] for found in before]
    if len(set(labels)) < len(labels):
        labels = list(streams)
    results: dict[str, dict[str, Any]] = {
        "original": {
            "perplexity": before[0].value,
            "texts": {
                label: {"perplexity": found.value} for label, found in zip(labels, before, strict=True)
            },
        },
        "protocol": {
            "evaluation": before[0].protocol,
            "texts": dict(zip(labels, (found.protocol for found in before), strict=True)),
        },
    }
    with TemporaryDirectory() as folder:
        for name in methods:
            method = METHODS[name]
            say(method.words)
            examined: list[Original] = []
            try:
                record = quantize(
                    replace(
                        method.options(options, Path(folder) / "out"), evaluation=NO_EVALUATION, force=True
                    ),
                    say=say_on_stderr,
                    say_result=lambda line: None,
                    examine=examined.append,
                )
            except FitError as error:  # a method that diverges is also a result
                results[method.words] = {"error": str(error)}
            else:
                results["protocol"].setdefault("calibration", _shared(record["calibration"]))
                on_texts = measure(examined.pop())
                results[method.words] = {
                    "bits_per_weight": round(record["bits_per_weight"], 3),
                    "perplexity": on_texts[labels[0]]["perplexity"],
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
