"""The tolerance table, and the one checker that applies it.

Every output of every operation has a row that says how it is compared, how far it may be off, and
why. Limits leave room for other orders of summation and lie far below what a wrong formula gives; the
reference itself stays within a thousandth of most of them. A backend that is given weights in float32
still computes in float64, so the same limits hold but for the rows of `_FLOAT32`.
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
        What it is for.
    measure : str
        "equal": no entry may differ. "trits": a trit may differ only where the decision on it was
        nearer to its threshold than the limit, and nowhere in exact and degenerate cases. Otherwise
        the largest difference, divided by a scale of `SCALES`.
    limits : dict of str to float
        By the precision of the weights.
    reasons : dict of str to str
        Why it is compared so, and why the limit is what it is.
    """

    operation: str
    output: str
    measure: str
    limits: dict[str, float]
    reasons: dict[str, str]

    @property
    def unit(self) -> str:
        """What errors and limits of this row are in."""
        if self.measure == "equal":
            return "entries that differ"
        if self.measure == "trits":
            return "of |Z| from its threshold"
        return f"of {SCALES[self.measure][0]}"


EQUAL = "nothing is rounded: integers, or bytes"

MOVED = "bits are moved, and what becomes wider is not rounded"
SUMS = "sums over a row in another order: about m·ε, m·2e-16 for m columns, with room for 100 m"


DECIDED = "a decision nearer to its threshold than rounding is not determined; golden ties are exact"


STORED = "computed to 1e-9 or better, and no golden value is that near to where float16 rounds up or down"


CODED = "computed to 1e-9 or better, and no golden value is that near to the middle of two codes, or is there"


ALIGNED = "sums over C, amplified by the condition of Eq. 12's 2x2 system, up to 1e3 on the slices"


PRINTED = "as for align_grid, and a row sum of C is a difference of larger numbers"


INVERTED = "ε times the condition of H: 3e-12, as it is 1.3e4 on the worst slice; with room for 30 of these"


FIGURES = "a figure of the report, a sum of squared errors; a wrong stage shows in the first digits"


# How far the output error of a whole matrix (Eq. 11) may be from the reference's, as a share of it.
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
        ("alpha", "row", 1e-12, SUMS + "; Eq. 9 amplifies them by at most m"),
        ("mu", "row", 1e-12, SUMS + "; Eq. 9 amplifies them by at most m"),
    ],
    "atq.flexible_round": [("T", "trits", 1e-12, DECIDED)],
    "atq.iterative_ternary_fitting": [
        ("alpha", "row", 1e-12, "the grid of the last trits, as for build_optimal_grid"),
        ("mu", "row", 1e-12, "the grid of the last trits, as for build_optimal_grid"),
        ("T", "trits", 1e-9, DECIDED + "; the grids behind them carry the error of build_optimal_grid"),
        ("errors", "energy", 1e-12, SUMS + ", in every half-step; their number must agree"),
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
        ("indices", "equal", 0, "golden similarities at the cut differ by 1e-8 or are tied")
    ],
    "ssr.block_variance": [("variance", "answer", 1e-12, SUMS)],
    "gptq.gram": [("C", "diagonal", 1e-13, SUMS.replace("m columns", "m tokens"))],
    "gptq.damp": [("H", "answer", 1e-14, "one sum of the diagonal, one product, one sum")],
    "gptq.invert_damped": [
        ("Hinv", "diagonal", 1e-10, INVERTED),
        ("damping", "answer", 1e-14, "one of the stated steps"),
    ],
    "gptq.compensate": [("W_R", "row", 1e-10, INVERTED)],
    "gptq.eliminate": [("Hinv", "diagonal", 1e-10, INVERTED)],
    "ternarize.ternarize": [
        ("trits", "trits", 1e-9, DECIDED + "; the margin of a case is that of its closest decision"),
        ("share of other trits", "one", 0, "in float64 no golden decision is near enough to turn"),
        ("scale", "equal", 0, STORED),
        ("shift", "equal", 0, STORED),
        *((f"{part}.codes", "equal", 0, CODED) for part in ("scale", "shift")),
        *((f"{part}.row", "equal", 0, STORED) for part in ("scale", "shift")),
        *((f"{part}.block", "equal", 0, STORED) for part in ("scale", "shift")),
        ("permutation", "equal", 0, "golden similarities at every cut differ by 1e-8, or are tied exactly"),
        ("weights", "equal", 0, "two float32 operations on what is stored"),
        (
            "output error",
            "answer",
            OUTPUT_ERROR,
            "Eq. 11 of the result; what must be kept of a whole matrix",
        ),
        ("report.damping", "answer", 1e-14, "one of the stated steps"),
        ("report.weight_power", "answer", 1e-12, FIGURES),
        ("report.output_power", "answer", 1e-12, FIGURES),
        ("report.iterations", "equal", 0, "rounds are counted"),
        ("report.weight_errors", "answer", 1e-10, FIGURES),
        ("report.aligned_weight_error", "answer", 1e-10, FIGURES),
        ("report.output_errors", "answer", 1e-10, FIGURES),
        ("report.variance_before", "answer", 1e-10, FIGURES),
        ("report.variance_after", "answer", 1e-10, FIGURES),
        ("report.relative_output_error", "answer", 1e-10, FIGURES),
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


ROUNDED = (
    "three float32 roundings, of what is moved and of the difference, each 6e-8 of at most twice the row"
)


# Limits and reasons that differ for weights in float32.
_FLOAT32: dict[str, dict[str, tuple[float, str]]] = {
    "gptq.compensate": {"W_R": (3e-7, ROUNDED)},
}


def _tolerance(operation: str, output: str, measure: str, limit: float, reason: str) -> Tolerance:
    limit32, reason32 = _FLOAT32.get(operation, {}).get(output, (limit, reason))
    return Tolerance(
        operation,
        output,
        measure,
        {"float64": limit, "float32": limit32},
        {"float64": reason, "float32": reason32},
    )


TOLERANCES: dict[str, dict[str, Tolerance]] = {
    operation: {row[0]: _tolerance(operation, *row) for row in rows} for operation, rows in _TABLE.items()
}


def _row_scale(case: Case, expected: Array) -> Array:
    """The largest weight or answer of the row."""
    weights = case.inputs["W"] if "W" in case.inputs else case.inputs["W_R"]
    return np.maximum(abs(weights).max(axis=1), abs(expected).max(axis=1))[:, None]


def _power(case: Case, expected: Array) -> Array:
    W, C = case.inputs["W"], case.inputs["C"]
    return np.maximum(((W @ C) * W).sum(), expected)


# What a difference is divided by: words for people, and a function of the case and the answer.
SCALES: dict[str, tuple[str, Callable[[Case, Array], Any]]] = {
    "one": ("1", lambda case, expected: 1.0),
    "answer": ("the largest |answer|", lambda case, expected: abs(expected).max(initial=0)),
    "row": ("the largest |W| or |answer| of the row", _row_scale),
    "diagonal": (
        "√(aᵢᵢ aⱼⱼ) of the answer a",
        lambda case, expected: np.sqrt(np.outer(np.diag(expected), np.diag(expected))),
    ),
    "energy": (
        "the larger of ‖W‖² and the largest answer",
        lambda case, expected: max(np.square(case.inputs["W"]).sum(), expected.max()),
    ),
    "power": ("the larger of tr(WCWᵀ) and the answer", _power),
    "slope": ("2 Σ|W|", lambda case, expected: 2 * abs(case.inputs["W"]).sum()),
    "output slope": (
        "2 Σ|W| |C|",
        lambda case, expected: 2 * (abs(case.inputs["W"]) @ abs(case.inputs["C"])).sum(),
    ),
}


@dataclass(frozen=True)
class Finding:
    """How one output of one case compared: its error, and what was wrong if the table does not allow it."""

    output: str
    error: float
    miss: str = ""


def check(case: Case, got: dict[str, Array], precision: str = "float64") -> list[Finding]:
    """Compare the outputs of one call, on weights of a precision, with the case's answer, by the table."""
    expected = dict(case.outputs)
    if case.operation == "ternarize.ternarize":
        expected, got = _with_whole_figures(case, expected), _with_whole_figures(case, got, expected)
    findings = []
    for output, answer in expected.items():
        row = TOLERANCES[case.operation][output]
        limit = row.limits[precision]
        problem = _other_kind(got.get(output), answer)
        error = float("inf") if problem else _error(row, case, got[output], answer)
        if not error <= limit:
            problem = problem or f"{error:.3g} {row.unit}, allowed {limit:g}"
        findings.append(Finding(output, error, problem))
    return findings


def _other_kind(got: Array | None, expected: Array) -> str:
    """What makes two arrays incomparable, if anything does."""
    if got is None:
        return "missing"
    if got.shape != expected.shape:
        return f"shape {got.shape} instead of {expected.shape}"
    # Any signed integer serves as an index; bytes, trits and stored floats have one type.
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
    # Where the scale is 0 nothing may differ: a difference there is infinitely wrong.
    with np.errstate(divide="ignore"):
        return float((abs(got - expected)[differs] / scale).max(initial=0))


def _with_whole_figures(
    case: Case, outputs: dict[str, Array], expected: dict[str, Array] | None = None
) -> dict[str, Array]:
    """Whole matrices are also compared by output error and by the share of equal trits."""
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
