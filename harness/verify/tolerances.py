"""The table of tolerances, and the check that applies it.

Every output of every operation has a row: how it is compared, its largest allowed error, and the reason.
The limits allow for other orders of summation, but are far below the error of a wrong formula; the
errors of the reference itself are below a thousandth of most limits. A backend with float32 weights still
computes in float64, so the same limits apply, except for the rows in `_FLOAT32`, and those in `_REFINED` for
matrices whose rows are refined, by products that may be float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.cases import Case
from reference.layout import Layout

Array = NDArray[Any]


@dataclass(frozen=True)
class Tolerance:
    """One row of the table.

    Attributes
    ----------
    operation, output : str
        Operation and output it applies to.
    measure : str
        "equal": no entry may differ. "trits": a trit may differ only where the decision on it was
        nearer to its threshold than the limit, and nowhere in exact and degenerate cases. Otherwise
        the largest difference, divided by a scale of `SCALES`.
    limits : dict of str to float
        Largest allowed error, by precision of the weights, and for float32 weights that are refined.
    reasons : dict of str to str
        Reason for the measure and the limit, by precision of the weights.
    """

    operation: str
    output: str
    measure: str
    limits: dict[str, float]
    reasons: dict[str, str]

    @property
    def unit(self) -> str:
        """Unit of the errors and limits of this row."""
        if self.measure == "equal":
            return "entries that differ"
        if self.measure == "trits":
            return "of |Z| from its threshold"
        return f"of {SCALES[self.measure][0]}"


EQUAL = "integers or bytes: nothing is rounded"

MOVED = "bits are moved; widening is exact"
SUMS = "row sums in another order: an error of about m·ε = m·2e-16 for m columns; allows 100 m"
DECIDED = "within rounding error of its threshold a decision may go either way; golden ties are exact"
STORED = "computed to 1e-9 or better; no golden value is that close to a rounding boundary of float16"
CODED = "computed to 1e-9 or better; no golden value is that close to a tie of two codes without being tied"
ALIGNED = "sums over C, amplified by the condition number of Eq. 12's 2x2 system, up to 1e3 on the slices"
PRINTED = "as for align_grid; also, a row sum of C is a difference of larger numbers"
INVERTED = "ε times the condition number of H, 1.3e4 on the worst slice, is 3e-12; allows 30 times that"
JOINT = "a system of a row that its ridge keeps to a condition of 1e3 times the blocks, of sums over H"
SHIFTED = "ε times the condition number of H, which damping keeps below 1e3"
FIGURES = "a sum of squared errors in the report; a wrong stage changes its first digits"

# Largest relative difference between the output error (Eq. 11) of a whole matrix and the reference's.
OUTPUT_ERROR = 1e-6

_LAYOUT = [(field.name, "equal", 0.0, MOVED) for field in fields(Layout)]

_TABLE: dict[str, list[tuple[str, str, float, str]]] = {
    "twn.symmetric_ternarize": [("alpha", "row", 1e-13, SUMS), ("T", "trits", 1e-12, DECIDED)],
    "atq.ternary_init": [
        ("alpha", "row", 1e-13, SUMS),
        ("mu", "row", 1e-13, SUMS),
        ("T", "trits", 1e-12, DECIDED),
    ],
    "atq.weight_error": [("error", "energy", 1e-13, SUMS)],
    "atq.weight_error_gradient": [("d_alpha", "slope", 1e-13, SUMS), ("d_mu", "slope", 1e-13, SUMS)],
    "atq.build_optimal_grid": [
        ("alpha", "row", 1e-12, SUMS + "; Eq. 9 amplifies it by at most m"),
        ("mu", "row", 1e-12, SUMS + "; Eq. 9 amplifies it by at most m"),
    ],
    "atq.flexible_round": [("T", "trits", 1e-12, DECIDED)],
    "atq.iterative_ternary_fitting": [
        ("alpha", "row", 1e-12, "the grid of the last trits, as for build_optimal_grid"),
        ("mu", "row", 1e-12, "the grid of the last trits, as for build_optimal_grid"),
        ("T", "trits", 1e-9, DECIDED + "; the grids they are based on have the error of build_optimal_grid"),
        ("errors", "energy", 1e-12, SUMS + ", in every half-step; the number of half-steps must agree"),
    ],
    "aga.output_error": [("error", "power", 1e-12, SUMS + ", and C adds m terms to each")],
    "aga.output_error_gradient": [
        ("d_alpha", "output slope", 1e-12, SUMS + ", and C adds m terms to each"),
        ("d_mu", "output slope", 1e-12, SUMS + ", and C adds m terms to each"),
    ],
    "aga.align_grid": [
        ("alpha", "row", 1e-11, ALIGNED),
        ("mu", "row", 1e-11, ALIGNED),
    ],
    "aga.align_grid_printed": [
        ("alpha", "row", 1e-10, PRINTED),
        ("mu", "row", 1e-10, PRINTED),
    ],
    "ssr.permute": [("permuted", "equal", 0, "columns are copied")],
    "ssr.cosine_similarity": [("S", "one", 1e-13, "sums over a column; a cosine is at most 1")],
    "ssr.select_block": [
        ("indices", "equal", 0, "golden similarities at the cut differ by 1e-8 or are exactly tied")
    ],
    "ssr.block_variance": [("variance", "answer", 1e-12, SUMS)],
    "gptq.gram": [("C", "diagonal", 1e-13, SUMS.replace("m columns", "m tokens"))],
    "gptq.damp": [("H", "answer", 1e-14, "one sum of the diagonal, one product, one sum")],
    "gptq.invert_damped": [
        ("Hinv", "diagonal", 1e-10, INVERTED),
        ("damping", "answer", 1e-14, "the initial damping times a power of 10"),
    ],
    "gptq.compensate": [("W_R", "row", 1e-10, INVERTED)],
    "gptq.eliminate": [("Hinv", "diagonal", 1e-10, INVERTED)],
    "targets.lost_products": [("D", "answer", 1e-13, SUMS.replace("m columns", "m tokens"))],
    "targets.token_weights": [("omega", "answer", 1e-14, SUMS)],
    "targets.shift_targets": [("W_star", "row", 1e-11, SHIFTED)],
    "feedforward.round_fed_forward": [("T", "trits", 1e-9, DECIDED + "; H is inverted before")],
    "joint.whole_error": [("error", "whole power", 1e-12, SUMS + ", and H adds m terms to each")],
    "joint.damped_objective": [("H", "answer", 1e-14, "one sum of the diagonal, one product, one sum")],
    "joint.spread": [("columns", "equal", 0, "values are copied")],
    "joint.align_jointly": [("alpha", "row", 1e-11, JOINT), ("mu", "row", 1e-11, JOINT)],
    "descent.descend": [("T", "trits", 1e-9, DECIDED)],
    "refine.refine": [
        ("alpha", "row", 1e-10, JOINT + ", again in every round"),
        ("mu", "row", 1e-10, JOINT + ", again in every round"),
        ("T", "trits", 1e-9, DECIDED + "; the grids they are based on have the error of align_jointly"),
        ("errors", "whole power", 1e-10, FIGURES),
    ],
    "ternarize.ternarize": [
        ("trits", "trits", 1e-9, DECIDED + "; the margin of a case is that of its closest decision"),
        ("share of other trits", "one", 0, "in float64, no golden decision is close enough to flip"),
        ("scale", "step", 0, STORED),
        ("shift", "step", 0, STORED),
        *((f"{part}.codes", "equal", 0, CODED) for part in ("scale", "shift")),
        *((f"{part}.row", "equal", 0, STORED) for part in ("scale", "shift")),
        *((f"{part}.block", "step", 0, STORED) for part in ("scale", "shift")),
        ("permutation", "equal", 0, "golden similarities at every cut differ by 1e-8 or are exactly tied"),
        ("weights", "row", 0, "two float32 operations on stored values"),
        ("output error", "answer", OUTPUT_ERROR, "Eq. 11, the objective of the whole method"),
        ("report.damping", "answer", 1e-14, "the initial damping times a power of 10"),
        ("report.weight_power", "answer", 1e-12, FIGURES),
        ("report.output_power", "answer", 1e-12, FIGURES),
        ("report.iterations", "equal", 0, "a count of iterations"),
        ("report.weight_errors", "answer", 1e-10, FIGURES),
        ("report.aligned_weight_error", "answer", 1e-10, FIGURES),
        ("report.output_errors", "answer", 1e-10, FIGURES),
        ("report.variance_before", "answer", 1e-10, FIGURES),
        ("report.variance_after", "answer", 1e-10, FIGURES),
        ("report.relative_output_error", "answer", 1e-10, FIGURES),
        ("report.refinement_errors", "answer", 1e-10, FIGURES + "; the number of steps must agree"),
    ],
    "grids.row_factor": [("row", "equal", 0, STORED)],
    "grids.encode": [("codes", "equal", 0, CODED), ("block", "equal", 0, STORED)],
    "packing.pack_base3": [("packed", "equal", 0, EQUAL)],
    "packing.unpack_base3": [("trits", "equal", 0, EQUAL)],
    "packing.pack_2bit": [("packed", "equal", 0, EQUAL)],
    "packing.unpack_2bit": [("trits", "equal", 0, EQUAL)],
    "layout.lay_words": [("words", "equal", 0, EQUAL)],
    "layout.lay_grid": [("grid", "equal", 0, MOVED)],
    "layout.lay_out": _LAYOUT,
    "layout.join": _LAYOUT,
    "matmul.matmul": [("y", "answer", 1e-13, SUMS)],
}

ROUNDED = "three roundings to float32, each by up to 6e-8 of a value that is at most twice the row's largest"

# Limits and reasons that differ for float32 weights.
_FLOAT32: dict[str, dict[str, tuple[float, str]]] = {
    "gptq.compensate": {"W_R": (3e-7, ROUNDED)},
}

PRODUCTS = "float32 products over the columns, an error of up to 1e-6, moves a stored value by a step at most"
# The same for whole matrices with a refinement. Trits and codes must be those of float64.
_REFINED: dict[str, tuple[float, str]] = {
    **dict.fromkeys(("scale", "shift", "scale.block", "shift.block"), (1.0, PRODUCTS)),
    "weights": (2.0**-9, PRODUCTS + ", twice 2^-11 of alpha and of mu"),
    "report.relative_output_error": (1e-6, PRODUCTS),
    "report.refinement_errors": (1e-5, PRODUCTS),
}


def _tolerance(operation: str, output: str, measure: str, limit: float, reason: str) -> Tolerance:
    rows = {"float64": (limit, reason)}
    rows["float32"] = _FLOAT32.get(operation, {}).get(output, rows["float64"])
    rows["refined float32"] = _REFINED.get(output, rows["float32"])
    return Tolerance(
        operation,
        output,
        measure,
        {precision: limit for precision, (limit, _) in rows.items()},
        {precision: reason for precision, (_, reason) in rows.items()},
    )


TOLERANCES: dict[str, dict[str, Tolerance]] = {
    operation: {row[0]: _tolerance(operation, *row) for row in rows} for operation, rows in _TABLE.items()
}


def _row_scale(case: Case, expected: Array) -> Array:
    """Largest |weight| or |answer| of each row."""
    weights = case.inputs["W"] if "W" in case.inputs else case.inputs["W_R"]
    return np.maximum(abs(weights).max(axis=1), abs(expected).max(axis=1))[:, None]


def _power(case: Case, expected: Array, gram: str = "C") -> Array:
    W, C = case.inputs["W"], case.inputs[gram]
    return np.maximum(((W @ C) * W).sum(), expected)


# Scales that differences are divided by: a description, and a function of the case and the answer.
SCALES: dict[str, tuple[str, Callable[[Case, Array], Any]]] = {
    "one": ("1", lambda case, expected: 1.0),
    "answer": ("the largest |answer|", lambda case, expected: abs(expected).max(initial=0)),
    "row": ("the largest |W| or |answer| of the row", _row_scale),
    "step": ("the step of float16 there", lambda case, expected: np.spacing(abs(expected))),
    "diagonal": (
        "√(aᵢᵢ aⱼⱼ) of the answer a",
        lambda case, expected: np.sqrt(np.outer(np.diag(expected), np.diag(expected))),
    ),
    "energy": (
        "the larger of ‖W‖² and the largest answer",
        lambda case, expected: max(np.square(case.inputs["W"]).sum(), expected.max()),
    ),
    "power": ("the larger of tr(WCWᵀ) and the answer", _power),
    "whole power": (
        "the larger of tr(WHWᵀ) and the answer",
        lambda case, expected: _power(case, expected, "H"),
    ),
    "slope": ("2 Σ|W|", lambda case, expected: 2 * abs(case.inputs["W"]).sum()),
    "output slope": (
        "2 Σ|W| |C|",
        lambda case, expected: 2 * (abs(case.inputs["W"]) @ abs(case.inputs["C"])).sum(),
    ),
}


@dataclass(frozen=True)
class Finding:
    """Error of one output of one case; `miss` says what is wrong if it exceeds the tolerance."""

    output: str
    error: float
    miss: str = ""


def check(case: Case, got: dict[str, Array], precision: str = "float64") -> list[Finding]:
    """Compare the outputs of one call with the case's answers by the table.

    Parameters
    ----------
    case : Case
        The golden case.
    got : dict of str to array
        Outputs of the backend, by name.
    precision : {"float32", "float64"}
        Precision of the weights passed to the backend.

    Returns
    -------
    list of Finding
        One for each output of the case.
    """
    expected = dict(case.outputs)
    if case.operation == "ternarize.ternarize":
        expected, got = _with_matrix_outputs(case, expected), _with_matrix_outputs(case, got, expected)
    if precision == "float32" and case.parameters.get("refinement", "none") != "none":
        precision = "refined float32"
    findings = []
    for output, answer in expected.items():
        row = TOLERANCES[case.operation][output]
        limit = row.limits[precision]
        problem = _mismatch(got.get(output), answer)
        error = float("inf") if problem else _error(row, case, got[output], answer)
        if not error <= limit:
            problem = problem or f"{error:.3g} {row.unit}, allowed {limit:g}"
        findings.append(Finding(output, error, problem))
    return findings


def _mismatch(got: Array | None, expected: Array) -> str:
    """Say why two arrays cannot be compared; return "" if they can."""
    if got is None:
        return "missing"
    if got.shape != expected.shape:
        return f"shape {got.shape} instead of {expected.shape}"
    # Indices may be of any signed integer type; bytes, trits and stored floats have exactly one dtype.
    narrow = expected.dtype.itemsize <= 2 or expected.dtype.kind == "u"
    if got.dtype.kind != expected.dtype.kind or (narrow and got.dtype != expected.dtype):
        return f"dtype {got.dtype} instead of {expected.dtype}"
    if not np.isfinite(got).all():
        return "not finite"
    return ""


def _error(row: Tolerance, case: Case, got: Array, expected: Array) -> float:
    differs = got != expected
    if row.measure == "equal":
        return float(np.count_nonzero(differs))
    if row.measure == "trits":
        margin = np.broadcast_to(case.margins.get(row.output, np.array(np.inf)), expected.shape)
        return float(margin[differs].max(initial=0))
    scale = np.broadcast_to(SCALES[row.measure][1](case, expected), expected.shape)[differs]
    # If the scale is 0, any difference counts as an infinite error.
    with np.errstate(divide="ignore"):
        return float((abs(got - expected)[differs] / scale).max(initial=0))


def _with_matrix_outputs(
    case: Case, outputs: dict[str, Array], expected: dict[str, Array] | None = None
) -> dict[str, Array]:
    """Add two outputs for whole matrices: the output error and the share of trits that differ."""
    outputs = dict(outputs)
    W, C = case.inputs["W"], case.inputs["C"]
    weights, trits = outputs.get("weights"), outputs.get("trits")
    if weights is not None and weights.shape == W.shape:
        E = W - weights
        outputs["output error"] = ((E @ C) * E).sum()
    reference = trits if expected is None else expected["trits"]
    if trits is not None and reference is not None and trits.shape == reference.shape:
        outputs["share of other trits"] = np.array((trits != reference).mean())
    return outputs
