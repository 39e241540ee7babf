"""Verify a backend by the golden cases, or by the reference on a real model: python -m harness.verify."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from typing import Any, NamedTuple

from golden.cases import FOLDER, KINDS, Case, GoldenError, load_cases
from harness.backends import Backend, load_backend
from harness.cli import EXIT_MISS, add_verbose, model_name, path, run
from harness.errors import UserError
from harness.files import json_text
from harness.progress import say_on_stdout
from harness.verify.cases import Outcome, verify
from harness.verify.record import add_to_record
from harness.verify.tolerances import TOLERANCES

DESCRIPTION = """\
Verify that a backend computes what the paper says.

Runs every golden case through the backend and compares the results with the
committed answers, by one table of tolerances. Golden answers come from rational
arithmetic, enumeration and dense least squares, never from the code under test.

For every operation, the report shows the number of cases; for every output, the
worst error, the tolerance, the quantity both are relative to, and the reason for
the tolerance. The error of a trit is the distance of its decision from the
threshold. The error of bytes and indices is the number of entries that differ."""

EPILOG = """\
examples:
  python -m harness.verify --backend reference      the reference, all cases
  python -m harness.verify --operation atq          one module, on the GPU if there is one
  python -m harness.verify --operation aga.align_grid --kind real
  python -m harness.verify --backend mybackend      any package with the modules and functions of reference/
  python -m harness.verify --json > verify.json     a report for programs
  python -m harness.verify --backend gpu --record golden/gpu-verified.json
  python -m harness.verify --backend gpu --model --record golden/gpu-verified.json

exit code: 0 all within tolerance, 1 an error beyond its tolerance or a changed golden file, 2 bad usage"""

EMBEDDED = "(embedded)"


def render(backend: Backend, outcomes: list[Outcome], seconds: float) -> str:
    """Format the report for people."""
    lines = []
    for outcome in outcomes:
        state = "MISS" if outcome.misses else "refused" if outcome.refused == outcome.cases else "ok"
        some = f", {outcome.refused} refused" if 0 < outcome.refused < outcome.cases else ""
        lines.append(f"{outcome.operation}: {outcome.cases} cases, {state}{some}")
        for output, (error, _) in outcome.worst.items():
            row = TOLERANCES[outcome.operation][output]
            limit, reason = row.limits[backend.precision], row.reasons[backend.precision]
            lines.append(f"  {output:29}worst {error:8.2g}   allowed {limit:<6g} {row.unit}")
            lines.append(f"      {reason}")
        lines += [f"  MISS {miss}" for miss in outcome.misses]
    misses = sum(len(outcome.misses) for outcome in outcomes)
    count = sum(outcome.cases for outcome in outcomes)
    verdict = f"FAIL: {misses} misses" if misses else "PASS"
    lines.append(
        f"{verdict}: backend {backend.name} in {backend.precision}, {count} cases of {len(outcomes)} "
        f"operations, {seconds:.1f} s"
    )
    return "\n".join(lines)


def as_json(backend: Backend, outcomes: list[Outcome]) -> dict[str, Any]:
    """Make the JSON report of one precision, by operation."""
    operations = {}
    for outcome in outcomes:
        rows = {output: TOLERANCES[outcome.operation][output] for output in outcome.worst}
        operations[outcome.operation] = {
            "cases": outcome.cases,
            "refused": outcome.refused,
            "outputs": {
                output: {
                    "worst_error": error,
                    "worst_case": case,
                    "tolerance": rows[output].limits[backend.precision],
                    "relative_to": rows[output].unit,
                    "reason": rows[output].reasons[backend.precision],
                }
                for output, (error, case) in outcome.worst.items()
            },
            "misses": outcome.misses,
        }
    return operations


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.verify",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_verbose(parser)
    parser.add_argument(
        "--backend",
        default="auto",
        help="reference, cpu, gpu, a package with the same modules, or auto: gpu if it can run, else cpu "
        "(default: auto)",
    )
    parser.add_argument("--operation", metavar="NAME", help="only this module or module.function")
    parser.add_argument("--kind", choices=KINDS, help="only cases of this kind")
    parser.add_argument(
        "--golden",
        type=path,
        default=FOLDER,
        metavar="DIR",
        help="folder of the golden files (default: the ones in the package)",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "float64"),
        help="dtype of the weights (default: all that the backend supports)",
    )
    parser.add_argument(
        "--model",
        nargs="?",
        type=model_name,
        const=EMBEDDED,
        metavar="MODEL",
        help="instead of the golden cases, fit every matrix of a real model with the backend and with the "
        "reference, on the same inputs; without MODEL, the default model of harness.quantize",
    )
    parser.add_argument("--json", action="store_true", help="print a single JSON object")
    parser.add_argument(
        "--record",
        type=path,
        metavar="FILE",
        help="if everything passes on a GPU, record the verified files in FILE, such as "
        "golden/gpu-verified.json",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    command = parser()
    options = command.parse_args(arguments)
    _require_compatible(options, command)
    backend = load_backend(options.backend, options.precision)
    if backend.note:
        print(backend.note, file=sys.stderr)
    if options.record and not backend.on_device:
        raise UserError(
            f"--record needs a CUDA GPU, but backend {backend.name} does not run on one here; drop --record, "
            "or use --backend gpu on a machine with a GPU"
        )
    try:
        checked = _on_model(options, backend) if options.model else _on_cases(options, command, backend)
    except GoldenError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISS
    text = checked.text
    if options.json:
        text = json_text({"backend": backend.name, "passed": checked.passed, checked.part: checked.results})
    say_on_stdout(text)
    if not checked.passed:
        return EXIT_MISS
    if options.record:
        add_to_record(options.record, backend, checked.part, checked.results)
        print(f"wrote {options.record}", file=sys.stderr)
    return 0


class Checked(NamedTuple):
    """One part of the record of verification, and its report in words."""

    part: str
    passed: bool
    results: dict[str, Any]
    text: str


def _require_compatible(options: argparse.Namespace, command: argparse.ArgumentParser) -> None:
    """Refuse options that exclude each other."""
    other_cases = options.golden != FOLDER
    if options.record and (options.operation or options.kind or options.precision or other_cases):
        command.error("--record needs all cases; drop --operation, --kind, --precision and --golden")
    if options.model and (options.operation or options.kind or other_cases):
        command.error("--model runs no golden cases; drop --operation, --kind and --golden")


def _on_model(options: argparse.Namespace, backend: Backend) -> Checked:
    """Compare a backend with the reference on a real model."""
    from harness.verify.real_model import compare_on_model  # importing torch takes seconds

    results = compare_on_model(None if options.model == EMBEDDED else options.model, backend)
    return Checked("real_model", results["passed"], results, json_text(results))


def _on_cases(options: argparse.Namespace, command: argparse.ArgumentParser, backend: Backend) -> Checked:
    """Run golden cases through a backend, in every precision that is asked for."""
    cases = _chosen(options, command)
    results, reports, passed = {}, [], True
    for precision in [options.precision] if options.precision else backend.precisions:
        precise = replace(backend, precision=precision)
        started = time.perf_counter()
        outcomes = verify(precise, cases)
        seconds = time.perf_counter() - started
        results[precision] = as_json(precise, outcomes)
        reports.append(render(precise, outcomes, seconds))
        passed = passed and not any(outcome.misses for outcome in outcomes)
    return Checked("golden", passed, results, "\n".join(reports))


def _chosen(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Case]:
    """Load the selected golden cases."""
    known = {name for operation in TOLERANCES for name in (operation, operation.partition(".")[0])}
    if options.operation and options.operation not in known:
        parser.error(f"unknown operation {options.operation!r}; choose from {', '.join(TOLERANCES)}")
    cases = [
        case
        for case in load_cases(options.golden)
        if options.kind in (None, case.kind)
        and (not options.operation or f"{case.operation}.".startswith(f"{options.operation}."))
    ]
    if not cases:
        parser.error(f"operation {options.operation} has no cases of kind {options.kind}; drop --kind")
    return cases


if __name__ == "__main__":
    run(main)
