"""The paper's Fig. 3 of a whole model, from the report of a run."""

from __future__ import annotations

from typing import Any


def summarize_stages(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum errors by stage over all matrices, and average the variance in blocks by layer.

    Parameters
    ----------
    layers : list of dict
        The layers of report.json.

    Returns
    -------
    dict
        ``weight_errors``, E_w / ‖W‖² at the start and after every half-step of ITF (a matrix that stopped
        earlier counts with its last value), and ``aligned_weight_error`` after AGA; ``output_errors``,
        E_x / tr(WCWᵀ) after every stage, and of the ``whole`` matrix as stored; ``variance``, one pair per
        layer: mean variance in blocks before and after reordering.
    """
    matrices = [matrix for layer in layers for matrix in layer["matrices"]]
    power = sum(matrix["weight_power"] for matrix in matrices)
    output = sum(matrix["output_power"] for matrix in matrices)

    def weights(values: list[float]) -> float:
        return sum(v * m["weight_power"] for v, m in zip(values, matrices, strict=True)) / power

    def outputs(values: list[float]) -> float:
        return sum(v * m["output_power"] for v, m in zip(values, matrices, strict=True)) / output

    curves = [matrix["weight_errors"] for matrix in matrices]
    steps = max(map(len, curves))
    return {
        "weight_errors": [weights([c[min(s, len(c) - 1)] for c in curves]) for s in range(steps)],
        "aligned_weight_error": weights([m["aligned_weight_error"] for m in matrices]),
        "output_errors": {
            **{s: outputs([m["output_errors"][s] for m in matrices]) for s in ("init", "itf", "aga")},
            "whole": outputs([m["relative_output_error"] for m in matrices]),
        },
        "variance": [
            [
                sum(matrix[f"variance_{when}"] for matrix in layer["matrices"]) / len(layer["matrices"])
                for when in ("before", "after")
            ]
            for layer in layers
        ],
    }
