"""The command line of every benchmark."""

from __future__ import annotations

import argparse

from harness import text
from harness.benchmark.mixture import PARTS, RUNS
from harness.benchmark.quantization import Scale
from harness.benchmark.shapes import SHAPES
from harness.cli import HelpFormatter, add_verbose, model_name, path, positive, window_length
from harness.comparison.methods import METHODS
from harness.comparison.speed import Lengths
from harness.quantize.options import PT2_LLM, RECIPES, Options

DESCRIPTION = """\
Run a benchmark on this machine and write the results to a file, with command, machine and date.

  run      time every stage of a quantization, and two plain forward passes of the same tokens
  busy     compare the CPU time of a quantization with that beside busy processes
  ranks    compare processes that share a quantization with one process; count what they send and compute
  methods  compare the paper's ablations and 2-bit baselines on the same text; processes of torchrun share it
  mixture  compare mixtures of experts, made of slices of a dense model's MLPs, with that model
  evaluate time perplexity and divergence beside bare forward passes
  fits     time fits of single matrices, by recipe, beside the reference
  quantize quantize random weights in the shapes of large models
  matmul   time products with matrices of large models, packed and dense
  generate measure tokens per second of random models of these shapes, dense and ternary
  plot     redraw the results of methods, matmul or generate, which plot them too

  python -m harness.benchmark run benchmarks/calibration.json
  python -m harness.benchmark run benchmarks/demo.json --report smollm2-ternary/report.json
  python -m harness.benchmark busy benchmarks/busy.json --nsamples 4 --seqlen 256
  python -m harness.benchmark methods benchmarks/methods.json --calibration FILE --eval FILE
  python -m harness.benchmark mixture benchmarks/mixture.json --calibration FILE --eval FILE
  python -m harness.benchmark evaluate benchmarks/evaluate.json --data wikitext2
  python -m harness.benchmark fits benchmarks/fits.json --matrix 1536x576 4096x4096
  python -m harness.benchmark quantize benchmarks/quantize.json --shape llama-7b llama-65b --layers 2
  python -m harness.benchmark matmul benchmarks/matmul.json --shape llama-7b llama-65b
  python -m harness.benchmark generate benchmarks/generate.json --shape llama-7b
  python -m harness.benchmark plot benchmarks/generate.json
"""


DEFAULT_MATRICES = "576x576 192x576 1536x576 576x1536"


def matrix_shape(value: str) -> tuple[int, int]:
    """An argparse type for a shape such as 1536x576."""
    rows, by, columns = value.partition("x")
    if not (by and rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise argparse.ArgumentTypeError(f"must be ROWSxCOLUMNS, such as 1536x576, got {value!r}")
    return int(rows), int(columns)


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.benchmark", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    def kind(name: str, what: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=what, description=what, formatter_class=HelpFormatter)
        where = "JSON file for the results; by default they are only printed"
        sub.add_argument("file", nargs="?", type=path, metavar="FILE", help=where)
        add_verbose(sub)
        return sub

    defaults = Options()
    sub = kind("run", "time every stage of a quantization, and two plain forward passes of the same tokens")
    model = sub.add_mutually_exclusive_group()
    model.add_argument("--model", type=model_name, metavar="MODEL", help="as for harness.quantize")
    sub.add_argument("--calibration", default=text.BUILTIN, metavar="TEXT", help=text.SOURCES_HELP)
    sub.add_argument("--nsamples", type=positive, default=defaults.nsamples, help="calibration windows")
    sub.add_argument("--seqlen", type=window_length, default=defaults.seqlen, help="tokens per window")
    model.add_argument(
        "--report",
        type=path,
        metavar="FILE",
        help="summarize this report.json of an earlier run on this machine instead of a new run",
    )

    sub = kind("busy", "compare the CPU time of a quantization with that beside busy processes")
    sub.add_argument("--model", type=model_name, metavar="MODEL", help="as for harness.quantize")
    sub.add_argument("--nsamples", type=positive, default=defaults.nsamples, help="calibration windows")
    sub.add_argument("--seqlen", type=window_length, default=defaults.seqlen, help="tokens per window")
    sub.add_argument(
        "--busy", type=positive, default=2, metavar="N", help="busy processes for every core of the machine"
    )

    sub = kind("ranks", "compare processes that share a quantization with one; count what they send")
    sub.add_argument("--model", type=model_name, metavar="MODEL", help="as for harness.quantize")
    sub.add_argument("--calibration", default=text.BUILTIN, metavar="TEXT", help=text.SOURCES_HELP)
    sub.add_argument("--recipe", choices=RECIPES, default="best", help="as for harness.quantize")
    sub.add_argument("--nsamples", type=positive, default=16, help="calibration windows")
    sub.add_argument("--seqlen", type=window_length, default=1024, help="tokens per window")
    sub.add_argument(
        "--processes", type=positive, default=2, help="processes, and threads of the one process"
    )
    sub.add_argument("--rounds", type=positive, default=3, help="runs of each kind, which alternate")
    counted = "models whose shapes to count for, with the paper's amount of calibration"
    sub.add_argument("--count", nargs="*", choices=SHAPES, default=["llama-7b", "llama2-70b"], help=counted)

    sub = kind("methods", "compare the paper's ablations and 2-bit baselines on the same text")
    listed = "\n".join(f"  {key:16} {method.words}" for key, method in METHODS.items())
    sub.epilog = f"methods, and their names in the results:\n{listed}"
    _add_comparison(sub, seqlen=1024, eval_seqlen=2048, eval_windows=8)
    sub.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD", help="run only these methods")

    sub = kind("mixture", "compare mixtures of experts, made of slices of a dense model, with that model")
    listed = "\n".join(f"  {part:16} {words}" for part, words in PARTS.items())
    sub.epilog = f"parts, and what they are:\n{listed}"
    _add_comparison(sub, seqlen=512, eval_seqlen=1024, eval_windows=4)
    sub.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="measure only these"
    )
    sub.add_argument(
        "--methods",
        nargs="+",
        choices=[key for key, method in METHODS.items() if method.method == PT2_LLM],
        default=list(RUNS),
        metavar="METHOD",
        help="methods to run, of those of the benchmark methods that ternarize",
    )
    sub.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted comparison: what FILE holds is not measured again",
    )

    sub = kind("evaluate", "time perplexity and divergence beside bare forward passes of the same windows")
    sub.add_argument("--model", type=model_name, metavar="MODEL", help="as for harness.quantize")
    sub.add_argument("--data", default=text.BUILTIN, metavar="TEXT", help=text.SOURCES_HELP)
    sub.add_argument("--seqlen", type=window_length, default=2048, help="tokens per window")
    sub.add_argument("--windows", type=positive, default=4, help="windows")
    sub.add_argument("--rounds", type=positive, default=3, help="measurements of each kind")

    sub = kind("fits", "time fits of single matrices, by recipe, beside the reference")
    sub.add_argument(
        "--matrix",
        nargs="+",
        type=matrix_shape,
        metavar="NxM",
        help=f"shapes (default: {DEFAULT_MATRICES}, those of SmolLM2-135M)",
    )
    sub.add_argument("--backend", default="auto", help="as for harness.quantize")

    scale = Scale("")
    shape_help = "models whose shapes to use, with random weights"
    sub = kind("quantize", "quantize random weights in the shapes of large models")
    sub.add_argument("--shape", nargs="+", choices=SHAPES, required=True, help=shape_help)
    sub.add_argument("--layers", type=positive, metavar="N", help="run only N layers, and extrapolate")
    sub.add_argument("--nsamples", type=positive, default=scale.nsamples, help="calibration windows")
    sub.add_argument("--seqlen", type=window_length, default=scale.seqlen, help="tokens per window")
    sub.add_argument("--backend", default="auto", help="as for harness.quantize")
    sub.add_argument("--device-memory", type=positive, metavar="GB", help="limit on the GPU memory to use")

    sub = kind("matmul", "time products with matrices of large models, packed and dense")
    sub.add_argument("--shape", nargs="+", choices=SHAPES, required=True, help=shape_help)
    sub.add_argument(
        "--batch",
        nargs="+",
        type=positive,
        default=[1, 4, 16, 128, 2048],
        metavar="N",
        help="numbers of rows of activations",
    )
    sub.add_argument(
        "--dtype", choices=("float16", "bfloat16"), default="bfloat16", help="dtype of the activations"
    )
    recipe_help = "recipe whose block size, grid and order the weights have"
    sub.add_argument("--recipe", choices=RECIPES, default="best", help=recipe_help)

    lengths = Lengths()
    sub = kind("generate", "measure tokens per second of random models of large shapes, dense and ternary")
    sub.add_argument("--shape", nargs="+", choices=SHAPES, required=True, help=shape_help)
    sub.add_argument("--layers", type=positive, metavar="N", help="use only N decoder layers")
    sub.add_argument("--prefill", type=positive, default=lengths.prefill, help="tokens in the prompt")
    sub.add_argument("--decode", type=positive, default=lengths.decode, help="tokens to generate")
    sub.add_argument("--recipe", choices=RECIPES, default="best", help=recipe_help)

    what = "draw the results of methods, matmul or generate (requires matplotlib)"
    sub = kinds.add_parser("plot", help=what, description=what, formatter_class=HelpFormatter)
    sub.add_argument("file", type=path, metavar="FILE", help="JSON file written by one of them")
    sub.add_argument(
        "svg", nargs="?", type=path, metavar="SVG", help="file to write; by default next to FILE"
    )
    return parser


def _add_comparison(
    parser: argparse.ArgumentParser, seqlen: int, eval_seqlen: int, eval_windows: int
) -> None:
    """Add the options of comparisons on the same text."""
    parser.add_argument("--model", type=model_name, metavar="MODEL", help="as for harness.quantize")
    parser.add_argument("--calibration", default=text.BUILTIN, metavar="TEXT", help=text.SOURCES_HELP)
    parser.add_argument(
        "--eval", nargs="+", default=[text.BUILTIN], metavar="TEXT", help="texts to measure on"
    )
    parser.add_argument("--text-column", metavar="NAME", help="as for harness.quantize")
    parser.add_argument("--nsamples", type=positive, default=16, help="calibration windows")
    parser.add_argument("--seqlen", type=window_length, default=seqlen, help="tokens per calibration window")
    parser.add_argument(
        "--eval-seqlen", type=window_length, default=eval_seqlen, help="tokens per evaluation window"
    )
    parser.add_argument("--eval-windows", type=positive, default=eval_windows, help="evaluation windows")
