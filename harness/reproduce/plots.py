"""Plots of tables and figures."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

from harness.comparison.plots import COLOURS, GREY, MARKERS, STAGES
from harness.plotting import handles_of, label_plainly
from harness.reproduce.render import cells_of, shown
from harness.reproduce.tables import RATES, SIZES
from harness.reproduce.tables import STAGES as BY_STAGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(table: dict[str, Any]) -> Figure:
    """Draw a table of a record."""
    if table["shows"] == BY_STAGE:
        return _draw_stages(table)
    if table["shows"] == RATES:
        return _draw_rates(table)
    return _draw_dots(table)


def _draw_dots(table: dict[str, Any]) -> Figure:
    """Draw one line of dots per row: perplexity and KL divergence by text, or size and time."""
    from matplotlib.figure import Figure

    rows = cells_of(table)
    panels: list[tuple[str, bool, dict[str, str]]]
    if table["shows"] == SIZES:
        panels = [("GB", False, {"GB": "this model", "paper: GB": "paper"})]
        panels.append(("minutes", False, {"minutes": "this model", "paper: minutes": "paper"}))
    else:
        texts = [column.removesuffix(": perplexity") for column in rows[0] if column.endswith(": perplexity")]
        published = {f"paper: {text}": f"{text}, paper" for text in texts}
        panels = [("perplexity", True, {**{f"{text}: perplexity": text for text in texts}, **published})]
        panels.append(
            ("KL divergence from the original, nats", False, {f"{text}: KL": text for text in texts})
        )
    figure = Figure(figsize=(8, 1.3 + 0.27 * len(rows)), layout="constrained")
    figure.suptitle(table["title"], fontsize=8, fontweight="bold", x=0.01, ha="left")
    axes = figure.subplots(1, 2, sharey=True)
    for panel, (title, logarithmic, series) in zip(axes, panels, strict=True):
        for (column, label), colour, marker in zip(series.items(), COLOURS, MARKERS, strict=False):
            values = [_finite(row.get(column)) for row in rows]
            if any(value is not None for value in values):
                points = [(value, y) for y, value in enumerate(values) if value is not None]
                panel.plot(*zip(*points, strict=True), marker, color=colour, label=label, clip_on=False)
        panel.set(xlabel=title, **({"xscale": "log"} if logarithmic else {"xlim": (0, None)}))
        if logarithmic:
            label_plainly(panel, panel.xaxis, *panel.get_xlim())
    axes[0].set_yticks(range(len(rows)), [textwrap.fill(_plain(row[""]), 40) for row in rows])
    axes[0].invert_yaxis()
    _legend(figure, list(axes))
    return figure


def _draw_stages(table: dict[str, Any]) -> Figure:
    """Draw Fig. 3: E_w by half-step, E_x by stage, variance in blocks by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    figure.suptitle(table["title"], fontsize=8, fontweight="bold", x=0.01, ha="left")
    weights, outputs, variance = figure.subplots(1, 3)
    for row, colour, marker in zip(table["rows"], COLOURS, MARKERS, strict=False):
        if "stages" not in row:
            continue
        stages, label = row["stages"], row["label"]
        curve = stages["weight_errors"]
        weights.plot(range(len(curve)), curve, color=colour, label=label)
        weights.plot(len(curve), stages["aligned_weight_error"], marker, color=colour)
        errors = stages["output_errors"]
        outputs.plot(range(len(errors)), list(errors.values()), color=colour, marker=marker, label=label)
        after = [pair[1] for pair in stages["variance"]]
        variance.plot(range(1, len(after) + 1), after, color=colour, label=label)
    weights.set(xlabel="half-steps of ITF, then AGA (marker)", ylabel="E_w / ‖W‖²")
    outputs.set(ylabel="E_x / tr(WCWᵀ)")
    outputs.set_xticks(range(4), ["start", "ITF", "AGA", "whole"])
    variance.set(xlabel="layer", ylabel="variance in blocks", yscale="log")
    label_plainly(variance, variance.yaxis, *variance.get_ylim())
    _legend(figure, [weights])
    return figure


def _draw_rates(table: dict[str, Any]) -> Figure:
    """Draw Fig. 4: tokens per second by stage."""
    from matplotlib.figure import Figure

    rows = [row for row in table["rows"] if "both" in row]
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    figure.suptitle(table["title"], fontsize=8, fontweight="bold", x=0.01, ha="left")
    for panel, (stage, words) in zip(figure.subplots(1, 3), STAGES.items(), strict=True):
        rates = [row[stage] for row in rows]
        bars = panel.bar(range(len(rows)), rates, 0.6, color=["#A6A6A6", *COLOURS][: len(rows)])
        panel.bar_label(bars, [shown(rate) for rate in rates], fontsize=7)
        panel.set_xticks(range(len(rows)), [_plain(row["label"]) for row in rows])
        panel.set_title(f"{stage}: {words}", loc="left")
        panel.set_ylabel("tokens per second")
        panel.margins(y=0.15)
    return figure


def _legend(figure: Figure, axes: list[Axes]) -> None:
    handles, labels = handles_of(axes)
    figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, labelcolor=GREY)


def _finite(value: Any) -> float | None:
    """Return a number that can be drawn; None for a diverged method, or a cell without a value."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _plain(label: Any) -> str:
    return str(label).replace("`", "")
