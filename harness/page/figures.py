"""Plots of a record, by matplotlib, as SVG inside the page: its fonts, and its colours in both themes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.page import tally
from harness.page.kinds import short_names
from harness.plotting import styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of the light theme, and the variables of template.html that take their place.
INK, MUTED, LINE = "#1d2026", "#5c626b", "#dcdfe3"
FIRST, SECOND, THIRD, FOURTH = "#0a6cb0", "#c8501e", "#0b8a68", "#8a6d1f"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    FIRST: "--first",
    SECOND: "--second",
    THIRD: "--third",
    FOURTH: "--fourth",
}

# Points; a plot is as wide as a phone, so that its text has the size of the page's there.
WIDTH, HEIGHT, ROW = 312, 200, 20
POINTS_PER_INCH = 72

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.edgecolor": LINE,
    "grid.color": LINE,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text, in the fonts of the page
}

# Kinds of matrices in one plot; more would not be told apart.
MOST_KINDS = 24
LONGEST_NAME = 20


@dataclass(frozen=True)
class Plot:
    """A plot: an SVG element, what it shows, and how to read it."""

    svg: str
    title: str
    caption: str


def plots(record: dict[str, Any]) -> dict[str, Plot]:
    """Draw every plot that a record has the figures for, by name.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    drawn = {}
    with styled(STYLE):
        for name, (draw, title, caption) in PLOTS.items():
            if (figure := draw(record)) is not None:
                drawn[name] = Plot(inline(figure, name, title), title, caption)
    return drawn


def inline(figure: Figure, name: str, title: str) -> str:
    """Turn a figure into an SVG element for a page, whose ids begin with `name`."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    return f'<svg role="img" aria-label="{title}" {box[0]}>{svg[svg.index(">") + 1 :].strip()}'


def _panel(height: float = HEIGHT) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / POINTS_PER_INCH, height / POINTS_PER_INCH))
    return figure, figure.subplots()


def draw_weight_errors(record: dict[str, Any]) -> Figure | None:
    """Draw E_w from the start through the half-steps of ITF to AGA: the paper's Fig. 3."""
    rows = [row for row in tally.matrices(record) if "weight_errors" in row]
    fitted = tally.spread(row["weight_errors"] for row in rows)
    aligned = tally.spread([row["aligned_weight_error"]] for row in rows)
    if fitted is None or aligned is None:
        return None
    figure, panel = _panel()
    rounds = np.arange(len(fitted.middle)) / 2
    panel.fill_between(rounds, fitted.low, fitted.high, color=FIRST, alpha=0.18, linewidth=0)
    panel.plot(rounds, fitted.middle, color=FIRST)
    after = rounds[-1] + max(1.0, 0.09 * rounds[-1])
    _range(panel, [after], aligned, FIRST)
    panel.plot([rounds[-1], after], [fitted.middle[-1], aligned.middle[0]], color=FIRST, linestyle=":")
    steps = [r for r in panel.get_xticks() if 0 <= r < 0.88 * rounds[-1] and r == int(r)]
    panel.set_xticks([*steps, after], [*(f"{r:.0f}" for r in steps), "AGA"])
    panel.set_xlim(-0.02 * after, after + 0.06 * after)
    panel.set(xlabel="rounds of ITF", ylabel="E_w / ‖W‖²")
    return figure


def draw_output_errors(record: dict[str, Any]) -> Figure | None:
    """Draw E_x at the start, after ITF and after AGA."""
    stages = ("init", "itf", "aga")
    rows = [row["output_errors"] for row in tally.matrices(record) if "output_errors" in row]
    found = tally.spread([row[stage] for stage in stages] for row in rows)
    if found is None:
        return None
    figure, panel = _panel()
    panel.plot(range(3), found.middle, color=SECOND, linestyle=":")
    _range(panel, range(3), found, SECOND)
    panel.set_xticks(range(3), ["start", "ITF", "AGA"])
    panel.set(ylabel="E_x / tr(W C Wᵀ)", xlim=(-0.3, 2.3))
    return figure


def draw_refinement(record: dict[str, Any]) -> Figure | None:
    """Draw the objective of the refinement, after the last block and after every step."""
    found = tally.spread(row.get("refinement_errors", ()) for row in tally.matrices(record))
    if found is None:
        return None
    figure, panel = _panel()
    steps = np.arange(len(found.middle))
    panel.fill_between(steps, found.low, found.high, color=THIRD, alpha=0.18, linewidth=0)
    panel.plot(steps, found.middle, color=THIRD, marker="o")
    panel.set(xlabel="steps of the refinement", ylabel="error / tr(W H Wᵀ)")
    panel.locator_params(axis="x", integer=True)
    return figure


def draw_layers(record: dict[str, Any]) -> Figure | None:
    """Draw the relative output error of every layer, and the range of its kinds of matrices."""
    layers = record["layers"]
    if len(layers) < 2:
        return None
    by_layer: dict[int, list[float]] = {}
    for (layer, _), cell in tally.cells(record).items():
        by_layer.setdefault(layer, []).append(cell.error)
    figure, panel = _panel()
    places = [layer["layer"] for layer in layers]
    low, high = ([pick(by_layer[place]) for place in places] for pick in (min, max))
    panel.fill_between(places, low, high, color=FIRST, alpha=0.18, linewidth=0, label="its matrices")
    panel.plot(places, [tally.error_of(layer) for layer in layers], color=FIRST, label="layer")
    panel.set(xlabel="layer", ylabel="relative output error", ylim=(0, None))
    panel.locator_params(axis="x", integer=True)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def draw_trits(record: dict[str, Any]) -> Figure | None:
    """Draw the shares of the trits -1, 0 and +1 by kind."""
    counts = dict(list(tally.trits(record).items())[:MOST_KINDS])
    if not counts:
        return None
    figure, panel = _rows_panel(counts)
    shares = np.array([np.array(found) / max(sum(found), 1) for found in counts.values()])
    left = np.zeros(len(shares))
    for place, (label, colour, opacity) in enumerate(
        (("−1", SECOND, 0.6), ("0", MUTED, 0.25), ("+1", FIRST, 0.6))
    ):
        widths = 100 * shares[:, place]
        bars = panel.barh(range(len(shares)), widths, 0.72, left, color=colour, alpha=opacity, label=label)
        panel.bar_label(
            bars, [f"{width:.0f}" for width in widths], label_type="center", color=INK, fontsize=9
        )
        left += widths
    panel.set(xlabel="share of trits, %", xlim=(0, 100))
    panel.grid(False)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def draw_alpha(record: dict[str, Any]) -> Figure | None:
    """Draw how |alpha| is distributed, by kind."""
    found = tally.histograms(record, "alpha")
    drawn = _ridges(found, lambda bins: 2.0 ** (bins / 4))
    if drawn is None:
        return None
    figure, panel = drawn
    _log_axis(panel, "|alpha|")
    return figure


def draw_mu(record: dict[str, Any]) -> Figure | None:
    """Draw how mu is distributed in units of |alpha|, by kind."""
    drawn = _ridges(tally.histograms(record, "mu"), lambda bins: bins / 8)
    if drawn is None:
        return None
    figure, panel = drawn
    panel.axvline(0, color=MUTED, linewidth=0.8)
    panel.set_xlabel("mu / |alpha|")
    return figure


def draw_variance(record: dict[str, Any]) -> Figure | None:
    """Draw the variance inside blocks before and after reordering, by kind; nothing if no column moved."""
    found = dict(list(tally.variances(record).items())[:MOST_KINDS])
    if all(before == after for before, after in found.values()):
        return None
    figure, panel = _rows_panel(found)
    for place, (before, after) in enumerate(found.values()):
        panel.plot([before, after], [place, place], color=MUTED, linewidth=1.2)
    for column, (label, colour) in enumerate((("before", MUTED), ("after", THIRD))):
        places = [pair[column] for pair in found.values()]
        panel.plot(places, range(len(found)), "o", color=colour, label=label)
    _log_axis(panel, "mean variance inside blocks")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def draw_time(record: dict[str, Any]) -> Figure | None:
    """Draw the time of every layer by stage."""
    layers = record["layers"]
    if not layers:
        return None
    stages = dict.fromkeys(name for layer in layers for name in layer["seconds"])
    figure, panel = _panel()
    bottom = np.zeros(len(layers))
    for name, colour in zip(stages, cycle((FOURTH, THIRD, FIRST, SECOND)), strict=False):
        heights = np.array([layer["seconds"].get(name, 0.0) for layer in layers])
        places = [layer["layer"] for layer in layers]
        panel.bar(places, heights, 0.8, bottom, color=colour, alpha=0.85, label=name)
        bottom += heights
    panel.set(xlabel="layer", ylabel="seconds")
    panel.locator_params(axis="x", integer=True)
    panel.grid(False, axis="x")
    figure.legend(loc="outside upper center", ncols=4, handlelength=1, columnspacing=1)
    return figure


def _log_axis(panel: Axes, label: str) -> None:
    """Make the x axis logarithmic if it spans enough for that, with few ticks and plain numbers."""
    from matplotlib.ticker import LogLocator

    low, high = panel.dataLim.intervalx
    if 0 < 5 * low < high:
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
    else:
        panel.locator_params(axis="x", nbins=4)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.set_xlabel(label)


def _range(panel: Axes, places: Iterable[float], found: tally.Spread, colour: str) -> None:
    """Draw medians as dots, and the range between the percentiles as lines."""
    panel.vlines(list(places), found.low, found.high, color=colour, alpha=0.35, linewidth=5)
    panel.plot(list(places), found.middle, "o", color=colour)


def _rows_panel(kinds: Iterable[str], row: float = ROW) -> tuple[Figure, Axes]:
    """A panel with one row for every kind, the first on top."""
    names = [_cut(name) for name in short_names(list(kinds)).values()]
    figure, panel = _panel(62 + row * len(names))
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0)
    panel.grid(False, axis="y")
    return figure, panel


def _cut(name: str) -> str:
    """Leave out the start of a name that is too long for a plot."""
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def _ridges(found: dict[str, Any], edge: Callable[[np.ndarray], np.ndarray]) -> tuple[Figure, Axes] | None:
    """Draw one histogram above the other, each as high as its row; `edge` is the lower end of a bin."""
    found = dict(list(found.items())[:MOST_KINDS])
    if not found:
        return None
    figure, panel = _rows_panel(found, 1.5 * ROW)
    for place, bins in enumerate(found.values()):
        numbers = np.arange(min(bins), max(bins) + 1)
        heights = np.array([bins.get(int(number), 0) for number in numbers])
        edges = edge(np.append(numbers, numbers[-1] + 1))
        tops = place + 0.45 - 0.95 * heights / heights.max()
        panel.stairs(tops, edges, baseline=place + 0.45, fill=True, color=FIRST, alpha=0.35, linewidth=0)
        panel.stairs(tops, edges, baseline=place + 0.45, color=FIRST, linewidth=1)
    return figure, panel


Draw = Callable[[dict[str, Any]], "Figure | None"]

# How to draw each plot, its title, and its caption.
PLOTS: dict[str, tuple[Draw, str, str]] = {
    "weights": (
        draw_weight_errors,
        "Weight error E_w",
        "What is left of the weights' power. AGA gives some of it back for a smaller output error.",
    ),
    "outputs": (
        draw_output_errors,
        "Output error E_x",
        "The same stages, by the error of the outputs.",
    ),
    "refinement": (
        draw_refinement,
        "Refinement of whole rows",
        "The damped output error after the last block, then after every joint grid and every descent.",
    ),
    "layers": (
        draw_layers,
        "Output error by layer",
        "The band reaches from the best kind of matrix in a layer to the worst.",
    ),
    "trits": (draw_trits, "Trits", "Shares of −1, 0 and +1 in all layers."),
    "alpha": (
        draw_alpha,
        "alpha",
        "Magnitude of alpha in all blocks, as stored; rows have their own scales.",
    ),
    "mu": (draw_mu, "mu", "mu of all blocks in units of |alpha|; rows have their own scales."),
    "variance": (
        draw_variance,
        "Variance inside blocks",
        "Before and after the columns were reordered; geometric means over layers.",
    ),
    "time": (draw_time, "Time by layer", "Stages of each layer."),
}
