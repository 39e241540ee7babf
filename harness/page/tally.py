"""Add up the figures of a record, as report.json holds it: by layer and kind of matrix, never by expert.

A record may be of an older version or of an unfinished run, so any figure may be missing. Numbers that JSON
cannot hold are strings in it ("inf", "nan"), which float() reads.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from harness.page.kinds import kind_of

# More blocks with an alpha too small for its type than this share are worth a warning.
LOST_SHARE = 0.01


@dataclass(frozen=True)
class Cell:
    """The matrices of one kind in one layer: one, or one of every expert.

    Attributes
    ----------
    rows : list of dict
        Their rows in the record.
    """

    rows: list[dict[str, Any]]

    @property
    def error(self) -> float:
        """Relative output error of all together, ΣE_x / Σtr(W C Wᵀ); of one without power, 0."""
        power = sum(float(row["output_power"]) for row in self.rows)
        errors = sum(error_of(row) * float(row["output_power"]) for row in self.rows)
        return errors / power if power > 0 else 0.0

    @property
    def worst(self) -> dict[str, Any]:
        """The row of the matrix with the largest error."""
        return max(self.rows, key=_badness)

    def mean(self, entry: str) -> float:
        """Mean of an entry over the matrices."""
        return float(np.mean([float(row[entry]) for row in self.rows]))


@dataclass(frozen=True)
class Worst:
    """One of the matrices with the largest errors.

    Attributes
    ----------
    row : dict
        Its row in the record.
    times_median : float
        Its error, as a multiple of the median of its kind in all layers; not finite if that is 0.
    reasons : list of str
        What is unusual about it.
    """

    row: dict[str, Any]
    times_median: float
    reasons: list[str]


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile over all matrices, at every step of a fit."""

    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray


def error_of(row: dict[str, Any]) -> float:
    """Relative output error of a row."""
    return float(row["relative_output_error"])


def matrices(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of all matrices."""
    return [row for layer in record["layers"] for row in layer["matrices"]]


def cells(record: dict[str, Any]) -> dict[tuple[int, str], Cell]:
    """Group the matrices by layer and kind, in the order of the record."""
    found: dict[tuple[int, str], Cell] = {}
    for layer in record["layers"]:
        for row in layer["matrices"]:
            found.setdefault((layer["layer"], kind_of(row["name"])), Cell([])).rows.append(row)
    return found


def kinds(record: dict[str, Any]) -> list[str]:
    """Kinds of matrices, in the order of the record."""
    return list(dict.fromkeys(kind for _, kind in cells(record)))


def worst(record: dict[str, Any], count: int) -> list[Worst]:
    """Return the matrices with the largest relative output errors, the worst first."""
    rows = matrices(record)
    errors: dict[str, list[float]] = {}
    for row in rows:
        errors.setdefault(kind_of(row["name"]), []).append(error_of(row))
    usual = {kind: median(found) for kind, found in errors.items()}
    chosen = sorted(rows, key=_badness, reverse=True)[:count]

    def times(row: dict[str, Any]) -> float:
        reference = usual[kind_of(row["name"])]
        return error_of(row) / reference if reference > 0 else math.nan

    return [Worst(row, times(row), reasons(row, record)) for row in chosen]


def reasons(row: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """Say what about a matrix may explain its error: too few tokens, inputs without values, lost blocks."""
    columns, tokens, dead = row["shape"][1], row.get("tokens"), row.get("dead_inputs", 0)
    found = []
    if tokens == 0:
        found.append("no tokens: fitted to average ones")
    elif tokens is not None and tokens < columns:
        found.append(f"few tokens: {tokens:,} for {columns:,} columns")
    if dead:
        found.append(f"dead inputs: {dead:,} of {columns:,} are always 0")
    if is_raised(row, record):
        found.append(f"damping raised to {row['damping']:g}")
    if row.get("lost_blocks", 0.0) > LOST_SHARE:
        found.append(f"lost blocks: alpha of {row['lost_blocks']:.0%} is too small to be stored")
    return found


def is_raised(row: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether a factorization needed more damping than configured."""
    return row.get("damping", 0.0) > record["config"]["damping"]


def spread(sequences: Iterable[Iterable[Any]]) -> Spread | None:
    """Summarize sequences step by step; those that ended earlier count with their last value."""
    lists = [[float(value) for value in sequence] for sequence in sequences]
    lists = [values for values in lists if values]
    if not lists:
        return None
    longest = max(map(len, lists))
    table = np.array([values + values[-1:] * (longest - len(values)) for values in lists])
    return Spread(*np.percentile(table, (10, 50, 90), axis=0))


def trits(record: dict[str, Any]) -> dict[str, list[int]]:
    """Numbers of trits -1, 0 and +1 by kind; without kinds of which no matrix has them counted."""
    found: dict[str, list[int]] = {}
    for row in matrices(record):
        if "trits" in row:
            sums = found.setdefault(kind_of(row["name"]), [0, 0, 0])
            for place, count in enumerate(row["trits"]):
                sums[place] += count
    return found


def histograms(record: dict[str, Any], entry: str) -> dict[str, Counter[int]]:
    """Numbers of blocks by bin of alpha or mu (`harness.quantize.histograms`), by kind."""
    found: dict[str, Counter[int]] = {}
    for layer in record["layers"]:
        for kind, grid in layer.get("grid", {}).items():
            counted = grid.get(entry, {"first": 0, "counts": []})
            bins = enumerate(counted["counts"], counted["first"])
            found.setdefault(kind, Counter()).update({place: count for place, count in bins if count})
    return {kind: bins for kind, bins in found.items() if bins}


def variances(record: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Variance inside blocks before and after reordering: geometric means over layers, by kind."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for (_, kind), cell in cells(record).items():
        if all("variance_before" in row for row in cell.rows):
            pair = (cell.mean("variance_before"), cell.mean("variance_after"))
            if min(pair) > 0:
                pairs.setdefault(kind, []).append(pair)
    means = {kind: np.exp(np.log(found).mean(axis=0)) for kind, found in pairs.items()}
    return {kind: (float(before), float(after)) for kind, (before, after) in means.items()}


def stage_seconds(record: dict[str, Any]) -> dict[str, float]:
    """Seconds by stage; those of the layers by what was done in them."""
    inside: dict[str, float] = {}
    for layer in record["layers"]:
        for name, value in layer["seconds"].items():
            inside[f"layers: {name}"] = inside.get(f"layers: {name}", 0.0) + value
    found: dict[str, float] = {}
    for name, value in record["seconds"].items():
        if name == "layers":
            # The rest is for writing shards, and for running finished layers again after --resume.
            found |= inside | {"layers: rest": max(value - sum(inside.values()), 0.0)}
        else:
            found[name] = value
    return found


def _badness(row: dict[str, Any]) -> float:
    error = error_of(row)
    return math.inf if math.isnan(error) else error
