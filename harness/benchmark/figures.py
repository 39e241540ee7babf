"""Draw results of harness.benchmark as SVG."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.comparison.plots import COLOURS, GREY, MARKERS, STAGES, svg_of, write_svg
from harness.errors import UserError
from harness.plotting import handles_of, label_plainly
from harness.words import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(file: Path, target: Path | None = None) -> Path:
    """Draw the plot of a file of results.

    Parameters
    ----------
    file : Path
        Results of ``harness.benchmark methods``, ``matmul`` or ``generate``.
    target : Path, optional
        The SVG file to write; by default, beside `file`.

    Returns
    -------
    Path
        The SVG file.

    Raises
    ------
    UserError
        If matplotlib is not installed, `file` is missing, damaged or of a kind without a plot, or `target`
        cannot be written.
    """
    if target is None:
        target = file.with_suffix(".svg") if file.suffix == ".json" else file.with_name(file.name + ".svg")
    if target.suffix != ".svg":
        raise UserError(f"plots are SVG files: choose a name that ends in .svg instead of {target}")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is missing or damaged: {error}") from None
    try:
        svg = svg_of(lambda: figure_of(record))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{file} cannot be drawn: {what}") from None
    write_svg(target, svg)
    return target


def draw_beside(file: Path) -> None:
    """Draw a file of new results; print its name, or the reason for a failure, to stderr.

    stdout carries the results as JSON.
    """
    try:
        print(f"plot: {draw(file)}", file=sys.stderr)
    except Exception as error:  # results are already saved, and may have taken hours
        print(f"no plot: {error}", file=sys.stderr)


def figure_of(record: Any) -> Figure:
    """Draw the plot of a record of harness.benchmark.

    Raises
    ------
    AttributeError, KeyError, TypeError, ValueError
        If the record is of a kind without a plot, or lacks an entry that the plot shows.
    """
    results = record.get("results") if isinstance(record, dict) else None
    if isinstance(results, dict) and "original" in results:
        return draw_quality(record)
    parts = list(results.values()) if isinstance(results, dict) else []
    if parts and all(isinstance(part, dict) and (part.get("products") or "dense" in part) for part in parts):
        return draw_speed(record)
    raise ValueError("only results of harness.benchmark's methods, matmul and generate have a plot")


def draw_speed(record: dict[str, Any]) -> Figure:
    """Plot speed: for products, the ratio to dense by batch, one panel per shape; else tokens per second."""
    from matplotlib.figure import Figure

    results: dict[str, Any] = record["results"]
    products = "products" in next(iter(results.values()))
    titles = results if products else STAGES
    # A matrix has the same colour and marker in every panel, even if some shapes lack it.
    rows = [row for result in results.values() for row in result.get("products", [])]
    matrices = list(dict.fromkeys(row["matrix"] for row in rows))
    across = min(len(results), 3) if products else 1
    down = math.ceil(len(titles) / across)
    width = max(5.6, 2.7 * across) if products else 8.0
    figure = Figure(figsize=(width, 1.4 + 1.9 * down), layout="constrained")
    figure.suptitle(_heading(record, width), fontsize=8, x=0.01, ha="left")
    panels = figure.subplots(down, across, squeeze=False, sharey=products).ravel()
    for panel in panels[len(titles) :]:
        panel.set_axis_off()
    for panel, title in zip(panels, titles, strict=False):
        if products:
            _draw_products(panel, results[title]["products"], matrices)
            panel.set_title(title, fontweight="bold", loc="left")
        else:
            _draw_rates(panel, results, title)
            panel.set_title(f"{title}: {STAGES[title]}", fontweight="bold", loc="left")
    figure.legend(*handles_of(list(panels)), loc="outside lower left", ncols=4, frameon=False)
    return figure


def _draw_products(panel: Axes, products: list[dict[str, Any]], matrices: list[str]) -> None:
    for matrix, colour, marker in zip(matrices, cycle(COLOURS), cycle(MARKERS), strict=False):
        points = sorted(
            (_positive(row["batch"]), _positive(row["times_faster_than_dense"]))
            for row in products
            if row["matrix"] == matrix
        )
        if points:
            batches, ratios = zip(*points, strict=True)
            panel.plot(batches, ratios, color=colour, marker=marker, label=matrix)
    panel.axhline(1, color=GREY, linestyle="--", label="as fast as dense")
    panel.set(xlabel="rows of activations", ylabel="times as fast as dense")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_major_formatter("{x:g}")


def _draw_rates(panel: Axes, results: dict[str, Any], stage: str) -> None:
    for shift, colour, kind in ((-0.2, "#A6A6A6", "dense"), (0.2, COLOURS[0], "ternary")):
        rates = [_positive(result[kind][stage]) for result in results.values()]
        bars = panel.bar([i + shift for i in range(len(rates))], rates, 0.4, color=colour, label=kind)
        panel.bar_label(bars, [_short(rate) for rate in rates], fontsize=7)
    names = []
    for shape, result in results.items():
        layers, whole = result["layers"], result["layers_of_the_model"]
        names.append(shape if layers == whole else f"{shape}\n{layers} of {counted(whole, 'layer')}")
    panel.set_xticks(range(len(names)), names)
    panel.set_ylabel("tokens per second")
    panel.margins(y=0.15)


def draw_quality(record: dict[str, Any]) -> Figure:
    """Plot perplexity against bits per weight: one labelled point per method, and the original as a line."""
    from matplotlib.figure import Figure

    results: dict[str, Any] = dict(record["results"])
    original, protocol = _positive(results.pop("original")["perplexity"]), results.pop("protocol")
    # A diverged method has an error instead of a perplexity, or the text "inf" or "nan".
    diverged = [name for name, found in results.items() if isinstance(found.get("perplexity", ""), str)]
    points = {
        name: (_positive(found["bits_per_weight"]), _positive(found["perplexity"]))
        for name, found in results.items()
        if name not in diverged
    }
    bits, perplexities = [x for x, _ in points.values()], [original, *(y for _, y in points.values())]
    left, right = min(bits, default=0) - 0.03, max(bits, default=0) + 0.03
    low, high = min(perplexities) / 1.5, max(perplexities) * 1.5
    anchors = {**points, "original": (right, original)}
    labels = {name: textwrap.fill(f"{name}: {_short(y)}", 36) for name, (_, y) in anchors.items()}
    missing = f"Diverged: {', '.join(diverged)}. " if diverged else ""
    heading = textwrap.fill(f"{missing}Text: {protocol['evaluation']}; {record['date']}", 110)

    # Inches: labels stand beside the axes, each as close to its point as the label below allows.
    inside = max(3.0, sum(map(_height, labels.values())))
    bottom, top = 0.45, 0.4 + _height(heading)
    height = bottom + inside + top
    figure = Figure(figsize=(8, height))
    figure.text(0.0125, 1 - 0.1 / height, "Perplexity by bits per weight", va="top", fontweight="bold")
    figure.text(0.0125, 1 - 0.28 / height, heading, va="top")
    panel = figure.add_axes((0.115, bottom / height, 0.535, inside / height))
    panel.set(
        xlabel="bits per weight", ylabel="perplexity", yscale="log", xlim=(left, right), ylim=(low, high)
    )
    label_plainly(panel, panel.yaxis, low, high)
    panel.axhline(original, color=GREY, linestyle="--")
    panel.plot(bits, perplexities[1:], "o", color=COLOURS[0])
    floor, room = 0.0, sum(map(_height, labels.values()))
    for name in sorted(labels, key=lambda name: anchors[name][1]):
        own = _height(labels[name])
        wanted = inside * math.log(anchors[name][1] / low) / math.log(high / low)
        room -= own
        middle = min(max(wanted, floor + own / 2), inside - room - own / 2)
        floor = middle + own / 2
        panel.annotate(
            labels[name],
            anchors[name],
            (1.05, middle / inside),
            textcoords="axes fraction",
            va="center",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "relpos": (0, 0.5)},
        )
    return figure


def _height(text: str) -> float:
    """Height of a text in inches, with a small margin."""
    return 0.15 * (1 + text.count("\n")) + 0.06


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _heading(record: dict[str, Any], width: float) -> str:
    """State device, dtype and date: figures of a CPU must not pass for those of a GPU."""
    results, machine = record["results"], record["machine"]
    device = _common(results, "device")
    if device == "CPU":
        device = f"CPU: {machine['cpu']}, {counted(machine['cores'], 'core')}"
    tokens = "products" not in next(iter(results.values())) and f"; batch 1; {_common(results, 'tokens')}"
    words = f"measured on {device}; {_common(results, 'dtype')}{tokens or ''}; {record['date']}"
    return textwrap.fill(words, int(13 * width))


def _common(results: dict[str, Any], key: str) -> str:
    """Return a value that all results of a run must share: one heading cannot describe several machines."""
    values = {str(result[key]) for result in results.values()}
    if len(values) > 1:
        raise ValueError(
            f"its results differ in {key} ({', '.join(sorted(values))}); draw each run by itself"
        )
    return values.pop()


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is not a positive number")
    return float(value)
