"""Whether a backend computes the paper: every golden case, by the one tolerance table."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from golden.cases import FOLDER, KINDS, Case, GoldenError, load_cases
from harness import verification
from harness.backends import Backend, MissingOperation, load_backend
from harness.cli import EXIT_MISS, UserError, json_text, run
from harness.tolerances import TOLERANCES, Finding, check
from reference.layout import Layout
from reference.types import CodedGrid, TernaryConfig, TernaryMatrix

DESCRIPTION = """\
Check that a backend computes the paper.

Runs every golden case through the backend and compares the answers with the
committed ones by one tolerance table. Golden answers come from rational
arithmetic, enumeration and dense least squares, never from the code under test.

For every operation the report shows the number of cases, and for every output
the worst error, the tolerance, what both are relative to, and why the tolerance
is what it is. Errors of trits are distances of a decision from its threshold;
those of bytes and indices count the entries that differ."""

EPILOG = """\
examples:
  python -m harness.verify --backend reference      the reference, all cases
  python -m harness.verify --operation atq          one module, by the GPU where there is one
  python -m harness.verify --operation aga.align_grid --kind real
  python -m harness.verify --backend mybackend      any package with the modules and functions of reference/
  python -m harness.verify --json > verify.json     the same for a program
  python -m harness.verify --backend gpu --record golden/gpu-verified.json
  python -m harness.verify --backend gpu --model --record golden/gpu-verified.json

exit code: 0 all within tolerance, 1 a miss or a changed golden file, 2 bad usage"""

EMBEDDED = "(embedded)"

EXCEPTIONS: dict[str, type[Exception]] = {"ValueError": ValueError, "LinAlgError": np.linalg.LinAlgError}


@dataclass
class Outcome:
    """One operation over all of its cases."""

    operation: str
    cases: int = 0
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)  # output: error, case
    misses: list[str] = field(default_factory=list)
    refused: int = 0

    def add(self, case: Case, findings: list[Finding]) -> None:
        """Take in what came of one case."""
        self.cases += 1
        for finding in findings:
            if finding.output and finding.error >= self.worst.get(finding.output, (-1.0, ""))[0]:
                self.worst[finding.output] = (finding.error, case.name)
            if finding.miss:
                self.misses.append(f"{case.name} {finding.output}: {finding.miss}".replace(" :", ":"))


def verify(backend: Backend, cases: list[Case]) -> list[Outcome]:
    """Run the cases; one outcome per operation, in the order of the table."""
    outcomes: dict[str, Outcome] = {}
    for case in cases:
        outcome = outcomes.setdefault(case.operation, Outcome(case.operation))
        if _refuses(backend, case):
            outcome.cases += 1
            outcome.refused += 1
        else:
            outcome.add(case, run_case(backend, case))
    return [outcomes[operation] for operation in TOLERANCES if operation in outcomes]


def _refuses(backend: Backend, case: Case) -> bool:
    """Whether the backend leaves out the operation, or the alignment that the case asks for."""
    printed = case.parameters.get("aga") == "printed" and "aga.align_grid_printed" in backend.refused
    return case.operation in backend.refused or printed


def run_case(backend: Backend, case: Case) -> list[Finding]:
    """Call the backend and compare."""
    try:
        function = backend.function(case.operation)
    except MissingOperation as missing:
        return [Finding("", np.inf, str(missing))]
    try:
        result = function(**_arguments(backend, case))
    except Exception as error:
        if case.raises and isinstance(error, EXCEPTIONS[case.raises]):
            return []
        wanted = f", {case.raises} was expected" if case.raises else ""
        return [Finding("", np.inf, f"{type(error).__name__}: {error}{wanted}")]
    if case.raises:
        return [Finding("", np.inf, f"an answer came back, {case.raises} was expected")]
    try:
        got = _by_name(backend, case, result)
    except Exception as error:
        wanted = ", ".join(case.outputs)
        return [
            Finding("", np.inf, f"what came back does not hold {wanted}: {type(error).__name__}: {error}")
        ]
    return check(case, got, backend.precision)


# Arguments that a backend takes in the precision of the weights.
WEIGHTS = ("W", "W_hat", "W_R", "A")


def _arguments(backend: Backend, case: Case) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for path, value in case.inputs.items():
        *groups, name = path.split(".")
        if (groups or [name])[0] in WEIGHTS and backend.precision == "float32":
            value = _narrowed(value)
        members = given
        for group in groups:
            members = members.setdefault(group, {})
        members[name] = backend.to_device(value)
    if case.operation == "layout.join":
        lay_out = backend.function("layout.lay_out")
        return {"layouts": [lay_out(**_whole(part), **case.parameters) for part in given["layouts"].values()]}
    if case.operation == "ternarize.ternarize":
        return {**_whole(given), "config": TernaryConfig(**case.parameters)}
    return {**_whole(given), **case.parameters}


def _whole(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments, with the members of grids of codes and of tuples put together."""
    arguments = {}
    for name, value in given.items():
        if isinstance(value, dict):
            value = CodedGrid(**value) if "codes" in value else tuple(value.values())
        arguments[name] = value
    return arguments


def _narrowed(weights: np.ndarray) -> np.ndarray:
    """Weights in float32 if that holds them exactly: rounding them would be another case."""
    with np.errstate(over="ignore"):
        narrow = weights.astype(np.float32)
    return narrow if np.array_equal(narrow, weights, equal_nan=True) else weights


def _by_name(backend: Backend, case: Case, result: Any) -> dict[str, Any]:
    """What the function returned, under the names of the case's outputs."""
    if isinstance(result, TernaryMatrix | CodedGrid | Layout):
        result = backend.to_host(result)
        return {name: np.asarray(_attribute(result, name)) for name in case.outputs}
    if len(case.outputs) == 1:
        named = dict(zip(case.outputs, [result], strict=True))
    else:
        named = dict(zip(case.outputs, result, strict=True))
    return {name: np.asarray(backend.to_host(value)) for name, value in named.items()}


def _attribute(result: Any, path: str) -> Any:
    if path == "weights":
        return result.dequantize()
    for name in path.split("."):
        result = getattr(result, name)
    # The three stages of the fit, in the order they run.
    return [result[stage] for stage in ("init", "itf", "aga")] if isinstance(result, dict) else result


def render(backend: Backend, outcomes: list[Outcome], seconds: float) -> str:
    """The report as people read it."""
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
    """The report of one precision as programs read it, by operation."""
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


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.verify",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--backend", default="auto", help="package with the functions of reference/, or auto (auto)"
    )
    parser.add_argument("--operation", metavar="NAME", help="only this module or module.function (all)")
    parser.add_argument("--kind", choices=KINDS, help="only cases of this kind (all)")
    parser.add_argument(
        "--golden",
        type=Path,
        default=FOLDER,
        metavar="DIR",
        help="folder of the golden files (the package's own)",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "float64"),
        help="type of the weights (all that the backend computes in)",
    )
    parser.add_argument(
        "--model",
        nargs="?",
        const=EMBEDDED,
        metavar="MODEL",
        help="fit every matrix of a real model by the backend and by the reference, on the same inputs, "
        "instead of the golden cases; without a name, the embedded model of harness.quantize",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="if all passes on a device, write what was verified there into this record "
        "(golden/gpu-verified.json)",
    )
    options = parser.parse_args(arguments)
    other_cases = options.golden != FOLDER
    if options.record and (options.operation or options.kind or options.precision or other_cases):
        parser.error("--record is for all cases: leave out --operation, --kind, --precision and --golden")
    if options.model and (options.operation or options.kind or other_cases):
        parser.error("--operation, --kind and --golden choose golden cases: leave them out with --model")

    first = load_backend(options.backend, options.precision)
    if first.note:
        print(first.note, file=sys.stderr)
    if options.record and not first.on_device:
        raise UserError(
            f"--record is for what passes on a CUDA device, and the backend {first.name} does not run on one "
            "here; leave it out, or run --backend gpu where there is a device"
        )
    backends = [first] if options.precision else [replace(first, precision=p) for p in first.precisions]
    if options.model:
        from harness.compare import compare_on_model  # torch and transformers take seconds to load

        source = None if options.model == EMBEDDED else options.model
        part = "real_model"
        results = compare_on_model(source, first)
        passed = results["passed"]
        text = json_text(results)
    else:
        part = "golden"
        try:
            cases = _chosen(options, parser)
        except GoldenError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_MISS
        results, reports, passed = {}, [], True
        for backend in backends:
            started = time.perf_counter()
            outcomes = verify(backend, cases)
            seconds = time.perf_counter() - started
            results[backend.precision] = as_json(backend, outcomes)
            reports.append(render(backend, outcomes, seconds))
            passed = passed and not any(outcome.misses for outcome in outcomes)
        text = "\n".join(reports)
    if options.json:
        text = json_text({"backend": first.name, "passed": passed, part: results})
    print(text)
    if not passed:
        return EXIT_MISS
    if options.record:
        verification.add_to_record(options.record, first, part, results)
        print(f"{options.record} written", file=sys.stderr)
    return 0


def _chosen(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Case]:
    """The golden cases asked for."""
    known = {name for operation in TOLERANCES for name in (operation, operation.partition(".")[0])}
    if options.operation and options.operation not in known:
        parser.error(f"no operation {options.operation!r}; known are {', '.join(TOLERANCES)}")
    cases = [
        case
        for case in load_cases(options.golden)
        if options.kind in (None, case.kind)
        and (not options.operation or f"{case.operation}.".startswith(f"{options.operation}."))
    ]
    if not cases:
        parser.error(f"no case of {options.operation} is of kind {options.kind}")
    return cases


if __name__ == "__main__":
    run(main)
