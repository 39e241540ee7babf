"""Measure speed, memory and quality, and write the results to a file: python -m harness.benchmark."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from harness.backends import load_backend
from harness.benchmark import figures
from harness.benchmark.busy import busy_cost
from harness.benchmark.evaluation import evaluation_speed
from harness.benchmark.fits import fit_speed
from harness.benchmark.generation import generation_speed
from harness.benchmark.methods import compare_methods, summarize
from harness.benchmark.mixture import compare_mixtures
from harness.benchmark.options import DEFAULT_MATRICES, matrix_shape, parser
from harness.benchmark.products import product_speed
from harness.benchmark.quantization import Scale, quantize_shape
from harness.benchmark.ranks import rank_counts, rank_speed
from harness.cli import run
from harness.comparison.methods import METHODS
from harness.comparison.speed import Lengths
from harness.compute import compute_for, default_compute
from harness.distributed.launch import joined
from harness.distributed.ranks import Ranks
from harness.errors import UserError
from harness.files import json_text, read_json, write_json
from harness.machine import provenance
from harness.progress import say_on_stdout
from harness.quantize.options import NO_EVALUATION, Options
from harness.quantize.run import quantize


def main() -> int:
    """Run the command line."""
    with joined() as ranks:
        return _measure(parser().parse_args(), ranks)


def _measure(arguments: argparse.Namespace, ranks: Ranks) -> int:
    if ranks.size > 1 and arguments.kind != "methods":
        raise UserError(f"{arguments.kind} is measured in one process; start it without torchrun")
    if arguments.kind == "plot":
        print(figures.draw(arguments.file, arguments.svg))
        return 0
    writes = arguments.file is not None and ranks.first
    if writes:
        _require_writable(arguments.file)
    described = provenance("harness.benchmark")

    def save(results: dict[str, Any]) -> None:
        if writes:
            write_json(arguments.file, {**described, "results": results})

    if arguments.kind == "run":
        results = _run_figures(arguments)
    elif arguments.kind == "busy":
        size = ["--nsamples", str(arguments.nsamples), "--seqlen", str(arguments.seqlen)]
        model = [] if arguments.model is None else ["--model", arguments.model]
        results = busy_cost([*size, *model], arguments.busy)
    elif arguments.kind == "ranks":
        results = _rank_figures(arguments)
    elif arguments.kind == "evaluate":
        window = arguments.seqlen, arguments.windows
        measured = arguments.model, arguments.data, *window
        results = evaluation_speed(*measured, default_compute(), arguments.rounds)
    elif arguments.kind == "fits":
        backend = load_backend(arguments.backend)
        matrices = arguments.matrix or [matrix_shape(name) for name in DEFAULT_MATRICES.split()]
        results = fit_speed(matrices, backend, load_backend("reference"), compute_for(backend), save)
    elif arguments.kind == "quantize":
        results = _quantize_shapes(arguments, save)
    elif arguments.kind == "matmul":
        results = {}
        for shape in arguments.shape:
            dtype = getattr(torch, arguments.dtype)
            results[shape] = product_speed(shape, default_compute(), arguments.batch, dtype, arguments.recipe)
            save(results)
    elif arguments.kind == "generate":
        results = {}
        for shape in arguments.shape:
            lengths = Lengths(arguments.prefill, arguments.decode)
            results[shape] = generation_speed(
                shape, default_compute(), arguments.layers, lengths, arguments.recipe
            )
            save(results)
    else:
        options = Options(
            model=arguments.model,
            calibration=arguments.calibration,
            text_column=arguments.text_column,
            nsamples=arguments.nsamples,
            seqlen=arguments.seqlen,
            evaluation_seqlen=arguments.eval_seqlen,
            evaluation_windows=arguments.eval_windows,
        )
        if arguments.kind == "methods":
            results = compare_methods(options, arguments.only or list(METHODS), arguments.eval, save)
        else:
            results = compare_mixtures(
                options,
                arguments.only,
                arguments.methods,
                arguments.eval,
                save,
                _earlier(arguments.file, described) if arguments.resume else {},
            )
    save(results)
    say_on_stdout(json_text(results))
    if arguments.kind in ("methods", "matmul", "generate") and writes:
        figures.draw_beside(arguments.file)
    return 0


def _require_writable(file: Path) -> None:
    """Refuse a file that cannot be written, before anything is measured."""
    if file.is_dir():
        raise UserError(f"{file} is a folder; pass a file name as FILE")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {file.parent} cannot be created: {error.strerror}") from None
    probe = file.with_name(file.name + ".partial")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None


def _earlier(file: Path | None, described: dict[str, Any]) -> dict[str, Any]:
    """Read the results of an interrupted benchmark; refuse those of another command or machine."""
    if file is None:
        raise UserError("--resume continues the results in a file; name it as FILE")
    if not file.exists():
        return {}
    earlier = read_json(file)
    for name, value in described.items():
        if name != "date" and earlier.get(name) != value:
            raise UserError(
                f"{file} cannot be resumed: its {name} is not that of this run; drop --resume to start over"
            )
    return earlier.get("results", {})


def _quantize_shapes(
    arguments: argparse.Namespace, save: Callable[[dict[str, Any]], None]
) -> dict[str, dict[str, Any]]:
    backend = load_backend(arguments.backend)
    if backend.note:
        say_on_stdout(backend.note)
    limit = arguments.device_memory
    compute = compute_for(backend, None if limit is None else limit * 10**9)
    results: dict[str, dict[str, Any]] = {}
    for shape in arguments.shape:
        scale = Scale(shape, arguments.layers, arguments.nsamples, arguments.seqlen)
        results[shape] = quantize_shape(scale, backend, compute)
        save(results)
    return results


def _rank_figures(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time one process and several on the command line's model, and count for larger ones."""
    size = ["--nsamples", str(arguments.nsamples), "--seqlen", str(arguments.seqlen)]
    model = [] if arguments.model is None else [arguments.model]
    run = [*model, *size, "--calibration", arguments.calibration, "--eval", NO_EVALUATION]
    measured = rank_speed([*run, "--recipe", arguments.recipe], arguments.processes, arguments.rounds)
    whole = Options()
    counts = {
        shape: rank_counts(shape, arguments.recipe, whole.nsamples, whole.seqlen, (1, 2, 4, 8))
        for shape in arguments.count
    }
    return {"measured": measured, "counted": counts}


def _run_figures(arguments: argparse.Namespace) -> dict[str, Any]:
    """Summarize the report given on the command line, or else a new run."""
    if arguments.report:
        try:
            return summarize(json.loads(arguments.report.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"{arguments.report} is missing or damaged: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{arguments.report} is not a quantization report: {error!r}") from None
    began, cpu = time.perf_counter(), time.process_time()
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
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    return {**summarize(record), "seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)}


if __name__ == "__main__":
    run(main, shared=True)
