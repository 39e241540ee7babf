"""Measure speed, memory and quality, and write the figures to a file: python -m harness.benchmark."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from harness import text
from harness.backends import load_backend
from harness.benchmark import figures
from harness.benchmark.generation import Lengths, generation_speed
from harness.benchmark.methods import METHODS, compare_methods, summarize
from harness.benchmark.products import product_speed
from harness.benchmark.quantization import Scale, quantize_shape
from harness.benchmark.shapes import SHAPES
from harness.cli import HelpFormatter, positive, run, window_length
from harness.compute import compute_for, default_compute
from harness.errors import UserError
from harness.files import json_text, write_json
from harness.machine import machine
from harness.quantize.options import NO_EVALUATION, Options
from harness.quantize.run import quantize

DESCRIPTION = """\
Measure on this machine and write the figures to a file, with command, machine and date.

  run      a whole quantization, stage by stage, against two plain forward passes of the same tokens
  methods  the paper's ablations and 2-bit baselines side by side, on one text
  quantize random layers of the shapes of large models through the whole pipeline
  matmul   microseconds of products with the matrices of these shapes, packed and dense
  generate tokens a second of models of these shapes, dense and ternary
  plot     draw a file that methods, matmul or generate wrote; with matplotlib installed they do so themselves

  python -m harness.benchmark run benchmarks/calibration.json
  python -m harness.benchmark run benchmarks/demo.json --report smollm2-ternary/report.json
  python -m harness.benchmark methods benchmarks/methods.json --calibration FILE --eval FILE
  python -m harness.benchmark quantize benchmarks/quantize.json --shape llama-7b llama-65b --layers 2
  python -m harness.benchmark matmul benchmarks/matmul.json --shape llama-7b llama-65b
  python -m harness.benchmark generate benchmarks/generate.json --shape llama-7b
  python -m harness.benchmark plot benchmarks/generate.json
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.benchmark", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    def kind(name: str, what: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=what, description=what, formatter_class=HelpFormatter)
        where = "where the figures go, as JSON; left out, they are only printed"
        sub.add_argument("file", nargs="?", type=Path, metavar="FILE", help=where)
        return sub

    defaults = Options()
    sub = kind("run", "a whole quantization, stage by stage, against two plain passes of the same tokens")
    model = sub.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="MODEL", help="as for harness.quantize")
    sub.add_argument("--calibration", default=text.BUILTIN, metavar="TEXT", help=text.SOURCES_HELP)
    sub.add_argument("--nsamples", type=positive, default=defaults.nsamples, help="windows")
    sub.add_argument("--seqlen", type=window_length, default=defaults.seqlen, help="tokens in a window")
    model.add_argument(
        "--report", type=Path, metavar="FILE", help="report.json of a run made on this machine"
    )

    sub = kind("methods", "the paper's ablations and 2-bit baselines side by side, on one text")
    listed = "\n".join(f"  {key:16} {method.words}" for key, method in METHODS.items())
    sub.epilog = f"methods, and what the results call them:\n{listed}"
    sub.add_argument("--model", metavar="MODEL", help="as for harness.quantize")
    sub.add_argument("--calibration", default=text.BUILTIN, metavar="TEXT", help=text.SOURCES_HELP)
    sub.add_argument("--eval", default=text.BUILTIN, metavar="TEXT", help="text for perplexity")
    sub.add_argument("--nsamples", type=positive, default=16, help="windows of calibration text")
    sub.add_argument("--seqlen", type=window_length, default=1024, help="tokens in a window")
    sub.add_argument("--eval-seqlen", type=window_length, default=2048, help="tokens in an evaluation window")
    sub.add_argument("--eval-windows", type=positive, default=8, help="evaluation windows")
    sub.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD", help="only these methods")

    scale = Scale("")
    sub = kind("quantize", "random layers of the shapes of large models through the whole pipeline")
    sub.add_argument("--shape", nargs="+", choices=SHAPES, required=True, help="models to imitate")
    sub.add_argument("--layers", type=positive, metavar="N", help="only N layers; the rest is extrapolated")
    sub.add_argument("--nsamples", type=positive, default=scale.nsamples, help="windows")
    sub.add_argument("--seqlen", type=window_length, default=scale.seqlen, help="tokens in a window")
    sub.add_argument("--backend", default="auto", help="as for harness.quantize")
    sub.add_argument("--device-memory", type=positive, metavar="GB", help="most memory of the device to use")

    sub = kind("matmul", "microseconds of products with the matrices of large shapes, packed and dense")
    sub.add_argument("--shape", nargs="+", choices=SHAPES, required=True, help="models to imitate")
    sub.add_argument(
        "--batch",
        nargs="+",
        type=positive,
        default=[1, 4, 16, 128, 2048],
        metavar="N",
        help="rows of activations",
    )
    sub.add_argument(
        "--dtype", choices=("float16", "bfloat16"), default="bfloat16", help="type of activations"
    )

    lengths = Lengths()
    sub = kind("generate", "tokens a second of models of large shapes, dense and ternary")
    sub.add_argument("--shape", nargs="+", choices=SHAPES, required=True, help="models to imitate")
    sub.add_argument("--layers", type=positive, metavar="N", help="only N decoder layers")
    sub.add_argument("--prefill", type=positive, default=lengths.prefill, help="tokens of the prompt")
    sub.add_argument("--decode", type=positive, default=lengths.decode, help="tokens to write")

    what = "draw a file that methods, matmul or generate wrote (needs matplotlib)"
    sub = kinds.add_parser("plot", help=what, description=what, formatter_class=HelpFormatter)
    sub.add_argument("file", type=Path, metavar="FILE", help="JSON that one of them wrote")
    sub.add_argument(
        "svg", nargs="?", type=Path, metavar="SVG", help="what to write; beside FILE if left out"
    )
    return parser


def main() -> int:
    """Run the command line."""
    arguments = parser().parse_args()
    if arguments.kind == "plot":
        print(figures.draw(arguments.file, arguments.svg))
        return 0
    if arguments.file is not None:
        _require_writable(arguments.file)
    described = {
        "command": f"python -m harness.benchmark {shlex.join(map(_without_folders, sys.argv[1:]))}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
    }

    def save(results: dict[str, Any]) -> None:
        if arguments.file is not None:
            write_json(arguments.file, {**described, "results": results})

    if arguments.kind == "run":
        results = _run_figures(arguments)
    elif arguments.kind == "quantize":
        results = _quantize_shapes(arguments, save)
    elif arguments.kind == "matmul":
        results = {}
        for shape in arguments.shape:
            dtype = getattr(torch, arguments.dtype)
            results[shape] = product_speed(shape, default_compute(), arguments.batch, dtype)
            save(results)
    elif arguments.kind == "generate":
        results = {}
        for shape in arguments.shape:
            lengths = Lengths(arguments.prefill, arguments.decode)
            results[shape] = generation_speed(shape, default_compute(), arguments.layers, lengths)
            save(results)
    else:
        options = Options(
            model=arguments.model,
            calibration=arguments.calibration,
            evaluation=arguments.eval,
            nsamples=arguments.nsamples,
            seqlen=arguments.seqlen,
            evaluation_seqlen=arguments.eval_seqlen,
            evaluation_windows=arguments.eval_windows,
        )
        results = compare_methods(options, arguments.only or list(METHODS), save)
    save(results)
    print(json_text(results))
    if arguments.kind in ("methods", "matmul", "generate") and arguments.file is not None:
        figures.draw_beside(arguments.file)
    return 0


def _require_writable(file: Path) -> None:
    """Refuse a file that could not be written after all was measured."""
    if file.is_dir():
        raise UserError(f"{file} is a folder; FILE names the file to write")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file.parent} cannot be made: {error.strerror}") from None
    probe = file.with_name(file.name + ".partial")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None


def _quantize_shapes(
    arguments: argparse.Namespace, save: Callable[[dict[str, Any]], None]
) -> dict[str, dict[str, Any]]:
    backend = load_backend(arguments.backend)
    if backend.note:
        print(backend.note)
    limit = arguments.device_memory
    compute = compute_for(backend, None if limit is None else limit * 10**9)
    results: dict[str, dict[str, Any]] = {}
    for shape in arguments.shape:
        scale = Scale(shape, arguments.layers, arguments.nsamples, arguments.seqlen)
        results[shape] = quantize_shape(scale, backend, compute)
        save(results)
    return results


def _run_figures(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of the report named on the command line, or of a run made for it."""
    if arguments.report:
        try:
            return summarize(json.loads(arguments.report.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"{arguments.report} is missing or damaged: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{arguments.report} is not the report of a run: {error!r}") from None
    with TemporaryDirectory() as folder:
        record = quantize(
            Options(
                model=arguments.model,
                out=Path(folder) / "out",
                calibration=arguments.calibration,
                evaluation=NO_EVALUATION,
                nsamples=arguments.nsamples,
                seqlen=arguments.seqlen,
            )
        )
    return summarize(record)


def _without_folders(word: str) -> str:
    """A word of the command line without the folders of this machine."""
    name, colon, path = word.rpartition(":")
    return f"{name}{colon}{Path(path).name}" if Path(path).is_absolute() else word


if __name__ == "__main__":
    run(main)
