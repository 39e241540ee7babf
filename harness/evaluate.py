"""Measure original and ternary models: python -m harness.evaluate MODEL...

Perplexity and divergence on a text; accuracy on zero-shot tasks through lm-eval.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from harness import text
from harness.calibration.capture import require_causal
from harness.cli import (
    HelpFormatter,
    add_trust_remote_code,
    add_verbose,
    model_name,
    path,
    positive,
    refuse_idle,
    run,
    window_length,
)
from harness.compute import Compute, default_compute
from harness.distributed.launch import joined
from harness.distributed.ranks import Ranks
from harness.divergence import Divergence, divergence_on, require_comparable
from harness.errors import UserError
from harness.files import json_text
from harness.hf import open_model
from harness.models.decoder import locate_layers
from harness.models.gguf import GGUF_DTYPES
from harness.models.loading import MODEL_HELP, NO_GGUF, is_gguf, load_original
from harness.models.original import Original
from harness.perplexity import Perplexity, measure_on
from harness.windows import AUTO, BOS_CHOICES, tokenize
from harness.words import counted
from harness.zeroshot.tasks import TASKS, example_of, load_tasks

# Tokens to see on whether a model looks ahead.
CAUSAL_TOKENS = 16

DESCRIPTION = """\
Measure perplexity as the GPTQ family does: split the text into consecutive windows of --seqlen tokens
and take the exponential of the mean negative log-likelihood. The protocol is printed with the result,
because perplexities by different protocols are not comparable. Processes that torchrun starts share the
windows; --tasks are measured by the first of them.

  python -m harness.evaluate smollm2-ternary --data wikitext2
  python -m harness.evaluate smollm2-ternary --original HuggingFaceTB/SmolLM2-135M-Instruct --data wikitext2
  python -m harness.evaluate --data wikitext2:wiki.test.raw --windows 8

With --tasks, measure accuracy on the paper's zero-shot tasks by lm-eval, whose own prompts and scoring are
used. Several models are shown side by side.

  python -m harness.evaluate meta-llama/Llama-2-7b-hf llama2-ternary --tasks all
  python -m harness.evaluate smollm2-ternary --tasks piqa,arc_easy --tasks-dir questions --limit 100
"""

ALL = "all"

# Options that change nothing without --tasks.
TASK_OPTIONS = ("tasks_dir", "limit", "batch_size")


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.evaluate", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    what = f"a ternary checkpoint; or {MODEL_HELP}"
    parser.add_argument("models", nargs="*", type=model_name, metavar="MODEL", help=what)
    add_text_options(parser, "measure perplexity on this text")
    parser.add_argument(
        "--packed",
        action="store_true",
        help="multiply by the packed weights of a ternary checkpoint, not by dense ones; saves memory",
    )
    parser.add_argument(
        "--original",
        type=model_name,
        metavar="MODEL",
        help="also compare predictions with those of this model: mean KL divergence, and how often both find "
        "the same token most likely; both models must fit in memory",
    )
    parser.add_argument(
        "--tasks",
        type=task_names,
        metavar="TASKS",
        help=f"measure accuracy on these tasks, separated by commas: {', '.join(TASKS)}; or {ALL}. "
        "Requires the package lm-eval",
    )
    parser.add_argument(
        "--tasks-dir",
        type=path,
        metavar="DIR",
        help="read questions from DIR/TASK_SPLIT.jsonl, such as piqa_val.jsonl or arc_easy_test.jsonl; by "
        "default they are downloaded",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="ask only the first N questions of each task"
    )
    parser.add_argument("--batch-size", type=positive, default=8, help="prompts of tasks at a time")
    add_trust_remote_code(parser)
    add_verbose(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def add_text_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the options that choose a text and the windows that are measured; `what` says what for."""
    parser.add_argument("--data", metavar="TEXT", help=f"{what}: {text.SOURCES_HELP}")
    parser.add_argument(
        "--text-column", metavar="NAME", help="field to read from .jsonl, .csv, .parquet and .arrow rows"
    )
    parser.add_argument("--seqlen", type=window_length, default=2048, help="tokens per window")
    parser.add_argument("--windows", type=positive, metavar="N", help="measure only the first N windows")
    parser.add_argument(
        "--bos",
        choices=BOS_CHOICES,
        default=AUTO,
        help="which windows begin with the BOS token in place of their first token: every-window, as "
        "llama.cpp does; as-tokenized: at most the first of a text, as the GPTQ family does; auto: "
        "every-window for Gemma models, which break down without it, else as-tokenized",
    )
    parser.add_argument(
        "--gguf-dtype", choices=GGUF_DTYPES, default="bfloat16", help="dtype to dequantize a GGUF file to"
    )
    parser.add_argument("--cpu", action="store_true", help="run on the CPU even if torch has a CUDA GPU")


def task_names(value: str) -> list[str]:
    """An argparse type for names of tasks separated by commas."""
    names = list(TASKS) if value == ALL else [name.strip() for name in value.split(",")]
    for name in names:
        if name not in TASKS:
            raise argparse.ArgumentTypeError(f"{name!r} is not a task; choose from {ALL}, {', '.join(TASKS)}")
    return list(dict.fromkeys(names))


def main() -> int:
    """Run the command line."""
    with joined() as ranks:
        return _evaluate(parser().parse_args(), ranks)


def _evaluate(arguments: argparse.Namespace, ranks: Ranks) -> int:
    stream = tasks = None
    if arguments.data is None and arguments.tasks is None:
        raise UserError("nothing to measure; pass --data for perplexity, --tasks for accuracy, or both")
    refuse_idle(parser(), arguments, _idle(arguments))
    text.require_rows(arguments.text_column, *filter(None, [arguments.data]))
    if arguments.data is not None:
        stream = text.read_text(arguments.data, text.EVALUATION, arguments.text_column)
    elif arguments.original is not None:
        raise UserError("--original compares predictions on a text; pass --data as well")
    if arguments.tasks is not None:
        tasks = load_tasks(arguments.tasks, arguments.tasks_dir, arguments.limit)
    compute = Compute(ranks=ranks) if arguments.cpu else default_compute()
    other = None
    if arguments.original is not None:
        other = load_original(arguments.original, arguments.gguf_dtype, arguments.trust_remote_code)
    results = []
    for source in arguments.models or [None]:
        results.append(_measure(source, other, stream, tasks, compute, arguments))
        if not arguments.json:
            for line in results[-1].lines():
                print(line, flush=True)
    if arguments.json:
        found = [result.to_json() for result in results]
        print(json_text(found if len(found) > 1 else found[0]))
    elif tasks is not None and ranks.first:
        from harness.zeroshot.measure import table

        print("\n".join(table([result.accuracies for result in results])))
    return 0


def _idle(arguments: argparse.Namespace) -> dict[str, str]:
    """Options that change nothing without another one."""
    idle: dict[str, str] = {}
    if arguments.data is None:
        idle |= dict.fromkeys(("text_column", "seqlen", "windows"), "without --data")
    if arguments.tasks is None:
        idle |= dict.fromkeys(TASK_OPTIONS, "without --tasks")
    models = [*(arguments.models or [None]), *filter(None, [arguments.original])]
    if not any(map(is_gguf, models)):
        idle["gguf_dtype"] = NO_GGUF
    return idle


@dataclass(frozen=True)
class _Result:
    """What was measured of one model."""

    model: str
    perplexity: Perplexity | None = None
    original: str | None = None
    divergence: Divergence | None = None
    accuracies: Any = None  # harness.zeroshot.measure.Accuracies

    def lines(self) -> Iterator[str]:
        """Format perplexity and divergence for people."""
        if self.perplexity is not None:
            yield f"perplexity {self.perplexity.value:.4g}   {self.model}\n  {self.perplexity.protocol}"
        if self.divergence is not None:
            yield (
                f"KL divergence from {self.original}: mean {self.divergence.mean:.4g}, 99th percentile "
                f"{self.divergence.percentile_99:.4g}; the same most likely token or label in "
                f"{self.divergence.agreement:.1%} of {counted(self.divergence.tokens, 'prediction')}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the object for a JSON report, without what was not measured."""
        found: dict[str, Any] = {"model": self.model}
        if self.perplexity is not None:
            found |= asdict(self.perplexity)
        if self.divergence is not None:
            found["divergence"] = {"original": self.original, **asdict(self.divergence)}
        if self.accuracies is not None:
            found["tasks"] = self.accuracies.to_json()
        return found


def _measure(
    source: str | None,
    other: Original | None,
    stream: text.AnyText | None,
    tasks: dict[str, Any] | None,
    compute: Compute,
    arguments: argparse.Namespace,
) -> _Result:
    """Load a model, and measure what was asked for."""
    model = open_model(
        source,
        compute.device if arguments.packed else "cpu",
        dense=not arguments.packed,
        gguf_dtype=arguments.gguf_dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    perplexity = compared = accuracies = None
    if other is not None:
        require_comparable(other, model)
    if stream is not None:
        _require_causal(model, stream)
        windows = (arguments.seqlen, arguments.windows, compute)
        if other is None:
            perplexity = measure_on(model, stream, *windows, bos=arguments.bos)
        else:
            perplexity, compared = divergence_on(other, model, stream, *windows, bos=arguments.bos)
    if tasks is not None and compute.ranks.first:
        from harness.zeroshot.measure import measure_tasks  # imports lm-eval

        _require_causal(model, example_of(tasks))
        accuracies = measure_tasks(
            model, tasks, arguments.limit, compute, arguments.batch_size, bos=arguments.bos
        )
    return _Result(model.name, perplexity, other.name if other else None, compared, accuracies)


def _require_causal(original: Original, stream: text.AnyText) -> None:
    """Refuse a model that sees the tokens it is to predict, if it has decoder layers to look at."""
    window = tokenize(stream, original.tokenizer).all()[:CAUSAL_TOKENS]
    try:
        decoder = locate_layers(original.model, original.read)
    except UserError:
        return
    # Ternary layers are of a model that was checked when it was quantized.
    if decoder.named_linears() and len(window) > 1:
        require_causal(original.model, decoder, window)


if __name__ == "__main__":
    run(main, shared=True)
