"""Run golden cases through a backend and check the results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from golden.cases import Case
from harness.backends import Backend, MissingOperation
from harness.verify.tolerances import TOLERANCES, Finding, check
from reference.layout import Layout
from reference.types import CodedGrid, TernaryConfig, TernaryMatrix

EXCEPTIONS: dict[str, type[Exception]] = {"ValueError": ValueError, "LinAlgError": np.linalg.LinAlgError}


@dataclass
class Outcome:
    """Results of one operation over all its cases."""

    operation: str
    cases: int = 0
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)  # output: error, case
    misses: list[str] = field(default_factory=list)
    refused: int = 0

    def add(self, case: Case, findings: list[Finding]) -> None:
        """Add the findings of one case."""
        self.cases += 1
        for finding in findings:
            if finding.output and finding.error >= self.worst.get(finding.output, (-1.0, ""))[0]:
                self.worst[finding.output] = (finding.error, case.name)
            if finding.miss:
                self.misses.append(f"{case.name} {finding.output}: {finding.miss}".replace(" :", ":"))


def verify(backend: Backend, cases: list[Case]) -> list[Outcome]:
    """Run the cases; return one outcome per operation, in the order of `TOLERANCES`."""
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
    """Whether the backend refuses the operation, or the variant of AGA in the case."""
    printed = case.parameters.get("aga") == "printed" and "aga.align_grid_printed" in backend.refused
    return case.operation in backend.refused or printed


def run_case(backend: Backend, case: Case) -> list[Finding]:
    """Run one case and check its outputs."""
    try:
        function = backend.function(case.operation)
    except MissingOperation as missing:
        return [Finding("", np.inf, str(missing))]
    try:
        result = function(**arguments(backend, case))
    except Exception as error:
        if case.raises and isinstance(error, EXCEPTIONS[case.raises]):
            return []
        wanted = f", expected {case.raises}" if case.raises else ""
        return [Finding("", np.inf, f"raised {type(error).__name__}: {error}{wanted}")]
    if case.raises:
        return [Finding("", np.inf, f"returned a result, expected {case.raises}")]
    try:
        got = _by_name(backend, case, result)
    except Exception as error:
        wanted = ", ".join(case.outputs)
        return [Finding("", np.inf, f"the result does not contain {wanted}: {type(error).__name__}: {error}")]
    return check(case, got, backend.precision)


# Arguments passed in the precision of the backend's weights.
WEIGHTS = ("W", "W_hat", "W_R", "A")


def arguments(backend: Backend, case: Case) -> dict[str, Any]:
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
    """Convert weights to float32 if that is exact; rounded weights would be a different case."""
    with np.errstate(over="ignore"):
        narrow = weights.astype(np.float32)
    return narrow if np.array_equal(narrow, weights, equal_nan=True) else weights


def _by_name(backend: Backend, case: Case, result: Any) -> dict[str, Any]:
    """Map the names of the case's outputs to the returned arrays."""
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
