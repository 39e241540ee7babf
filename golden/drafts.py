"""Build cases: compute answers by an `Arithmetic`, and reject answers that depend on rounding."""

from __future__ import annotations

from typing import Any

import numpy as np

from golden.answers import ORIGINS, answer
from golden.arithmetic import Array, Dense, Exact
from golden.cases import Case, Tensors

# Reject an answer if one of its decisions is closer to the threshold than this: another order of summation
# could change it. Exact ties are allowed if the case says so; their numbers are binary fractions, which
# float64 computes without rounding.
SAFE_DISTANCE = {"exact": 1e-6, "degenerate": 1e-6, "real": 1e-8}


class Ambiguous(Exception):
    """A case whose answer depends on rounding."""


class Drafts:
    """A list of cases of one kind; `add` computes their answers."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.cases: list[Case] = []

    def add(
        self,
        operation: str,
        label: str,
        inputs: dict[str, Any],
        *,
        hidden: dict[str, Any] | None = None,
        ties: bool = False,
        why: str = "",
        **parameters: Any,
    ) -> Tensors:
        """Add a case and return its answer.

        `hidden` holds inputs for the independent implementation only. `ties` allows decisions exactly on a
        threshold. `why` is appended to the origin.
        """
        arrays = _arrays(inputs)
        kit = Dense() if self.kind == "real" else Exact()
        outputs = answer(kit, operation, {**arrays, **_arrays(hidden or {})}, parameters)
        origin = ORIGINS["real" if self.kind == "real" else "exact"][operation]
        name = f"{operation}:{label}"
        for distances in kit.noted:
            close = distances < SAFE_DISTANCE[self.kind]
            if ties:
                close &= distances != 0
            if close.any():
                raise Ambiguous(f"{name}: a decision is {distances.min():.2g} from its threshold")
        margins = _margins(operation, kit.noted) if self.kind == "real" else {}
        origin += f". {why}" if why else ""
        self.cases.append(Case(name, operation, self.kind, origin, arrays, parameters, outputs, margins))
        return outputs

    def refuse(
        self, operation: str, label: str, inputs: dict[str, Any], raises: str, **parameters: Any
    ) -> None:
        """Add a case that must raise the exception `raises`."""
        origin = "input for which nothing is defined"
        name = f"{operation}:{label}"
        self.cases.append(
            Case(name, operation, self.kind, origin, _arrays(inputs), parameters, raises=raises)
        )


def _margins(operation: str, noted: list[Array]) -> Tensors:
    if operation in ("twn.symmetric_ternarize", "atq.ternary_init", "atq.flexible_round"):
        return {"T": noted[0]}
    if operation == "atq.iterative_ternary_fitting":
        # Once a trit of a row differs, all later steps of the row differ.
        return {"T": np.min(noted, axis=0).min(axis=1, keepdims=True)}
    if operation == "ternarize.ternarize":
        return {"trits": np.array(min(float(distances.min()) for distances in noted))}
    return {}


def _arrays(values: dict[str, Any]) -> Tensors:
    """Convert floats to float64, and keep integer arrays; nested lists of ints are weights, so float64."""
    return {
        name: value if isinstance(value, np.ndarray) else np.array(value, dtype=np.float64)
        for name, value in values.items()
    }
