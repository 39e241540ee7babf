"""Report finished layers: rows for the record, and the table printed at the end."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.calibration.fits import FittedMatrix
from harness.calibration.layerwise import FittedLayer
from harness.quantize.histograms import count_trits, grid_histograms
from harness.words import counted
from reference.types import TernaryMatrix


def matrix_row(fitted: FittedMatrix) -> dict[str, Any]:
    """Report one matrix: name, shape, what it lost, seconds, and the fit (for a baseline, only its error)."""
    return {
        "name": fitted.name,
        "shape": list(fitted.weight.shape),
        "tokens": fitted.tokens,
        "dead_inputs": fitted.dead_inputs,
        "lost_blocks": fitted.lost,
        "seconds": fitted.seconds,
        **({"trits": count_trits(fitted.result)} if isinstance(fitted.result, TernaryMatrix) else {}),
        **fitted.figures,
    }


def layer_row(index: int, layer: FittedLayer) -> dict[str, Any]:
    """Report one layer; its relative output error is ΣE_x / Σtr(W C Wᵀ) over its matrices."""
    rows = [matrix_row(matrix) for matrix in layer.matrices]
    for row in rows:
        if row["name"] in layer.experts:
            row["family"] = layer.experts[row["name"]]
    power = sum(r["output_power"] for r in rows)
    error = sum(r["relative_output_error"] * r["output_power"] for r in rows)
    return {
        "layer": index,
        "relative_output_error": error / power if power > 0 else 0.0,
        "seconds": layer.seconds,
        "shared_inputs": [group for group in layer.groups if len(group) > 1],
        **({"bytes_between_processes": layer.sent} if layer.sent else {}),
        **({"experts": experts_row(rows)} if layer.experts else {}),
        **({"grid": grid} if (grid := grid_histograms(layer.matrices)) else {}),
        "matrices": rows,
    }


def experts_row(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Count the matrices of experts that were fitted to average tokens too (`calibration.experts`)."""
    tokens = [(row["tokens"], row["shape"][1]) for row in rows if "family" in row]
    return {
        "matrices": len(tokens),
        "fewest_tokens": min(count for count, _ in tokens),
        "filled_up": sum(0 < count < columns for count, columns in tokens),
        "without_tokens": sum(count == 0 for count, _ in tokens),
    }


def mean_layer_error(layers: list[dict[str, Any]]) -> float:
    """Average the relative output error over layers."""
    return float(np.mean([layer["relative_output_error"] for layer in layers]))


def table(layers: list[dict[str, Any]]) -> list[str]:
    """Format errors after each stage, variance in blocks, and the error of the whole matrix.

    Every matrix has a line, but the matrices of one kind of a layer's experts share one.
    """
    rows = [row for layer in layers for row in _with_families(layer["matrices"])]
    width = max(len(row["name"]) for row in rows)
    grouped = any("others" in row for row in rows)
    families = ["experts (*): medians, and the seconds of all; report.json has each"] if grouped else []
    if "output_errors" not in rows[0]:
        lines = [f"{'matrix':{width}}  {'whole':>9}  {'s':>5}"]
        for r in rows:
            figures = f"{r['relative_output_error']:9.5f}  {r['seconds']:5.1f}"
            lines.append(f"{r['name']:{width}}  {figures}{r.get('others', '')}")
        return [*lines, "whole: E_x / tr(WCWᵀ) of the whole matrix", *families]
    lines = [
        f"{'':{width}}  {'E_w / ‖W‖²':^26}  {'E_x / tr(WCWᵀ)':^26}  {'variance in blocks':^20}  {'':9}",
        f"{'matrix':{width}}  {'init':>8} {'ITF':>8} {'AGA':>8}  {'init':>8} {'ITF':>8} {'AGA':>8}  "
        f"{'before':>9} {'after':>9}   {'whole':>8} {'ITF rounds':>10} {'s':>5}",
    ]
    for r in rows:
        weight, output = r["weight_errors"], r["output_errors"]
        lines.append(
            f"{r['name']:{width}}  {weight[0]:8.5f} {weight[-1]:8.5f} {r['aligned_weight_error']:8.5f}  "
            f"{output['init']:8.5f} {output['itf']:8.5f} {output['aga']:8.5f}  "
            f"{r['variance_before']:9.3g} {r['variance_after']:9.3g}   "
            f"{r['relative_output_error']:8.5f} {r['iterations']:10d} {r['seconds']:5.1f}"
            f"{r.get('others', '')}"
        )
    return [
        *lines,
        "E_w, E_x: sums over blocks, relative to the weights that each block was fitted to (compensated for",
        "earlier blocks); whole: stored matrix relative to what it was fitted to, its target if it has one;",
        "ITF rounds: the most of any block",
        *families,
    ]


def _with_families(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put one row in the place of those of a family: medians, and the worst error and the tokens in words."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.get("family", row["name"]), []).append(row)
    return [_family_row(name, own) if "family" in own[0] else own[0] for name, own in found.items()]


def _family_row(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    worst = max(row["relative_output_error"] for row in rows)
    tokens = [row["tokens"] for row in rows]
    others = f"  {counted(len(rows), 'expert')}, worst {worst:.5f}, tokens {min(tokens)}-{max(tokens)}"
    merged = {"name": name, "others": others, "seconds": sum(row["seconds"] for row in rows)}
    single = ("aligned_weight_error", "variance_before", "variance_after", "relative_output_error")
    merged |= {key: float(np.median([row[key] for row in rows])) for key in single if key in rows[0]}
    if "output_errors" in rows[0]:
        merged["weight_errors"] = [
            float(np.median([row["weight_errors"][place] for row in rows])) for place in (0, -1)
        ]
        merged["output_errors"] = {
            key: float(np.median([row["output_errors"][key] for row in rows]))
            for key in rows[0]["output_errors"]
        }
        merged["iterations"] = max(row["iterations"] for row in rows)
    return merged
