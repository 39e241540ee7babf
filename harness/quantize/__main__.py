"""Ternarize a language model: python -m harness.quantize MODEL --out DIR."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from harness import text
from harness.calibration.methods import BASELINES
from harness.cli import HelpFormatter, add_trust_remote_code, positive, run, window_length
from harness.errors import UserError
from harness.models.gguf import GGUF_DTYPES
from harness.models.loading import MODEL_HELP
from harness.quantize.options import AS_IT_IS, INT8, NO_EVALUATION, PT2_LLM, Options
from harness.quantize.run import quantize
from reference.types import ALIGNMENTS, GRIDS, REORDERINGS, STARTS, TernaryConfig

DESCRIPTION = """\
Ternarize the linear layers of a language model with PT²-LLM and write a packed checkpoint.

Layer by layer, calibration text is run through the layers ternarized so far, and each weight matrix
is fitted to the inputs it really gets. Embeddings, norms and lm_head stay as they are, unless
--embedding says otherwise. The result is a Hugging Face folder with a report.json; read it back with
harness.load(DIR).

  python -m harness.quantize --out smollm2-ternary
  python -m harness.quantize meta-llama/Llama-2-7b-hf --out llama2-ternary
  python -m harness.quantize MODEL --calibration wikitext2:wiki.train.raw \\
      --eval wikitext2:wiki.test.raw --out DIR
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    defaults = Options()
    config = defaults.config
    parser = argparse.ArgumentParser(
        prog="python -m harness.quantize", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    add("--out", type=Path, metavar="DIR", help="folder to write; may be left out for a baseline")
    add("--force", action="store_true", help="write into DIR though it is not empty")
    add(
        "--resume",
        action="store_true",
        help="go on with a run into DIR that was stopped, given otherwise the same command",
    )
    add(
        "--backend",
        choices=("auto", "reference", "gpu"),
        default=defaults.backend,
        help="auto takes the GPU where there is a CUDA device with CuPy and numba-cuda, and says so",
    )
    add("--gguf-dtype", choices=GGUF_DTYPES, default=defaults.gguf_dtype, help="what a GGUF is loaded in")
    add_trust_remote_code(parser)

    add = parser.add_argument_group("calibration").add_argument
    add(
        "--calibration",
        metavar="TEXT",
        help=f"{text.SOURCES_HELP}. Default: wikitext2; for the embedded model {text.BUILTIN}",
    )
    add("--text-column", metavar="NAME", help="field of .jsonl, .parquet and .arrow rows")
    add(
        "--nsamples",
        type=positive,
        metavar="N",
        default=defaults.nsamples,
        help="windows of calibration text",
    )
    add("--seqlen", type=window_length, metavar="N", default=defaults.seqlen, help="tokens in a window")
    add(
        "--seed",
        type=int,
        metavar="N",
        default=config.seed,
        help="of the windows' places and of --reorder random",
    )
    add("--true-sequential", action="store_true", help="collect inputs again inside each layer")

    add = parser.add_argument_group("method", "the defaults are the paper's where it names one").add_argument
    add(
        "--method",
        choices=(PT2_LLM, *BASELINES),
        default=defaults.method,
        help="pt2-llm, or a baseline in groups of --block-size that gives a report and no checkpoint: "
        + "; ".join(f"{name}: {what}" for name, what in BASELINES.items()),
    )
    add(
        "--block-size",
        type=positive,
        metavar="K",
        default=config.block_size,
        help="columns that share alpha and mu",
    )
    add(
        "--grid",
        choices=GRIDS,
        default=config.grid,
        help="what alpha and mu are stored in; int8 takes an eighth of a bit a weight less",
    )
    add(
        "--embedding",
        choices=(AS_IT_IS, INT8),
        default=defaults.embedding,
        help="what embedding and head are stored in",
    )
    add("--start", choices=STARTS, default=config.start, help="first grid: Eq. 4-5, or Eq. 1-3 with mu = 0")
    add("--reorder", choices=REORDERINGS, default=config.reorder, help="order of the columns")
    add(
        "--itf",
        action=argparse.BooleanOptionalAction,
        default=config.itf,
        help="iterative ternary fitting",
    )
    add(
        "--aga",
        choices=ALIGNMENTS,
        default=config.aga,
        help="grid alignment: none, Eq. 12, Eq. 13 as printed, or Eq. 12 with the compensated cost",
    )
    add(
        "--compensation",
        action=argparse.BooleanOptionalAction,
        default=config.compensation,
        help="move the error of each block into the columns after it",
    )
    add(
        "--damping",
        type=float,
        metavar="X",
        default=config.damping,
        help="share of mean(diag C) added to the diagonal",
    )
    add(
        "--max-iterations",
        type=positive,
        metavar="N",
        default=config.max_iterations,
        help="most rounds of ITF",
    )

    add = parser.add_argument_group("evaluation, before and after").add_argument
    add(
        "--eval",
        dest="evaluation",
        metavar="TEXT",
        help=f"text for perplexity, or {NO_EVALUATION}. Default: the evaluation split of --calibration, "
        f"{NO_EVALUATION} if that is a file",
    )
    add(
        "--eval-seqlen",
        type=window_length,
        metavar="N",
        default=defaults.evaluation_seqlen,
        help="tokens in a window",
    )
    add("--eval-windows", type=positive, metavar="N", help="measure only the first N windows")
    return parser


def main() -> int:
    """Run the command line."""
    arguments = parser().parse_args()
    try:
        config = TernaryConfig(**{name: getattr(arguments, name) for name in asdict(TernaryConfig())})
    except ValueError as error:
        raise UserError(str(error)) from None
    quantize(
        Options(
            model=arguments.model,
            out=arguments.out,
            force=arguments.force,
            resume=arguments.resume,
            backend=arguments.backend,
            embedding=arguments.embedding,
            gguf_dtype=arguments.gguf_dtype,
            trust_remote_code=arguments.trust_remote_code,
            calibration=arguments.calibration,
            text_column=arguments.text_column,
            nsamples=arguments.nsamples,
            seqlen=arguments.seqlen,
            true_sequential=arguments.true_sequential,
            method=arguments.method,
            config=config,
            evaluation=arguments.evaluation,
            evaluation_seqlen=arguments.eval_seqlen,
            evaluation_windows=arguments.eval_windows,
        )
    )
    return 0


if __name__ == "__main__":
    run(main)
