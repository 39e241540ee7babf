"""Figures of the results of harness.benchmark, for `harness.plot`."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's colours, which people with any kind of colour blindness tell apart, without the two that
# are too light for a thin line on white. Markers tell lines apart where there is no colour at all.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#595959"
BARS = {"dense": "#A6A6A6", "ternary": COLOURS[0]}
DENSE_LINE: dict[str, Any] = {"color": GREY, "linewidth": 1, "linestyle": (0, (4, 2))}
PALE_LINE: dict[str, Any] = {"color": "#C4C4C4", "linewidth": 1}

STAGES = {"prefill": "reading the prompt", "decode": "writing after it", "both": "end to end"}
PACKED = "packed"
SOME_LAYERS = (
    "Where only some layers of a model were measured, the whole model is slower and its ratio another: "
    "embedding and head, dense in both, weigh less in it."
)

# More panels side by side, or more pairs of bars in a third of the width, cannot be read on a page.
MOST_ABREAST = 4
# Inches; scaled to the width of a README, text is as large as the page's small print.
WIDTH, LEFT, RIGHT, HEADER, LINE = 9.2, 1.0, 0.15, 1.08, 0.13


@dataclass(frozen=True)
class Product:
    """A matrix and a batch: how many times as fast as dense each way is, and the packed one's bandwidth."""

    matrix: str
    batch: float
    ratios: dict[str, float]
    share: float


@dataclass(frozen=True)
class Rate:
    """A shape: tokens a second at each of `STAGES`, and how many of the model's layers there were."""

    shape: str
    layers: int
    layers_of_the_model: int
    dense: tuple[float, ...]
    ternary: tuple[float, ...]
    ratios: tuple[float, ...]


@dataclass(frozen=True)
class Layout:
    """A grid of panels: how many, and inches of what is in and between them.

    `labels` is what the text below the last row takes.
    """

    down: int
    across: int
    width: float
    height: float
    below: float
    between: float
    labels: float


def products_figure(record: dict[str, Any], results: dict[str, Any]) -> Figure:
    """A column for every shape; rows for the packed product, its bandwidth, and every further way."""
    from matplotlib.lines import Line2D

    shapes = {shape: [_product(row) for row in result["products"]] for shape, result in results.items()}
    if not all(shapes.values()):
        raise ValueError("a shape has no products")
    products = [product for of_shape in shapes.values() for product in of_shape]
    further = list(dict.fromkeys(way for product in products for way in product.ratios if way != PACKED))
    rows = 2 + len(further)
    across, bands = min(len(shapes), MOST_ABREAST), math.ceil(len(shapes) / MOST_ABREAST)
    width = min(WIDTH, 4 + 1.7 * across)
    layout = Layout(bands * rows, across, width, 1.3, 0.33 if bands == 1 else 0.7, 0.12, 0.42)
    title = "Products with packed ternary matrices against dense ones"
    looks = {
        matrix: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, matrix in enumerate(dict.fromkeys(product.matrix for product in products))
    }
    others = {"as fast as dense": DENSE_LINE, **({"packed, as above": PALE_LINE} if further else {})}
    legend = [Line2D([], [], label=name, **look) for name, look in {**looks, **others}.items()]
    figure, axes = _panels(layout, title, _measured(record, results), legend, [_command(record)])
    ratios = [ratio for product in products for ratio in product.ratios.values()]
    highest_share = max(product.share for product in products)
    for i in range(bands * across):
        down = i // across * rows
        column = [row[i % across] for row in axes[down : down + rows]]
        if i >= len(shapes):
            for panel in column:
                panel.set_axis_off()
            continue
        shape, of_shape = list(shapes.items())[i]
        _draw_ratios(column[0], of_shape, PACKED, looks, ratios)
        _draw_shares(column[1], of_shape, looks, highest_share)
        for panel, way in zip(column[2:], further, strict=True):
            _draw_ratios(panel, of_shape, way, looks, ratios)
        copied = _number(results[shape]["copy_gb_s"])
        column[0].set_title(shape, fontweight="bold", loc="left")
        column[1].set_title(f"100 % = {copied:,.4g} GB/s", fontsize=7, color=GREY, loc="right", pad=2)
        column[-1].set_xlabel("batch (rows of activations)")
        for panel in column:
            _set_batches(panel, of_shape)
            panel.tick_params(labelleft=i % across == 0, labelbottom=panel is column[-1])
        if i % across == 0:
            column[1].set_ylabel("packed\nbandwidth, share\nof a copy's")
            for panel, way in zip((column[0], *column[2:]), (PACKED, *further), strict=True):
                panel.set_ylabel(f"{way}\ntimes as fast\nas dense")
    figure.align_ylabels()
    return figure


def _product(row: dict[str, Any]) -> Product:
    dense = _number(row["dense_us"])
    further = {
        key.removesuffix("_us"): dense / _number(value)
        for key, value in row.items()
        if key.endswith("_us") and key not in ("dense_us", f"{PACKED}_us")
    }
    ratios = {PACKED: _number(row["times_faster_than_dense"]), **further}
    # A small product on a slow machine reaches so little that the file has 0.
    share = _number(row["share_of_copy_bandwidth"], or_zero=True)
    return Product(str(row["matrix"]), _number(row["batch"]), ratios, share)


def _draw_ratios(
    panel: Axes, products: list[Product], way: str, looks: dict[str, dict[str, Any]], ratios: list[float]
) -> None:
    """Lines of a way, on an axis that has room for all `ratios` so that panels can be compared."""
    panel.axhline(1, **DENSE_LINE)
    for matrix in looks if way != PACKED else ():
        panel.plot(*_line(products, matrix, PACKED), **PALE_LINE)
    for matrix, look in looks.items():
        panel.plot(*_line(products, matrix, way), label=matrix, **look)
    # From half to twice at the least, so that noise looks like noise.
    lowest, highest = min(0.5, *ratios) / 1.2, max(2, *ratios) * 1.2
    powers = range(math.ceil(math.log2(lowest)), math.floor(math.log2(highest)) + 1)
    shown = [power for power in powers if power % math.ceil(len(powers) / 6) == 0]
    panel.set_yscale("log", base=2)
    panel.set_ylim(lowest, highest)
    panel.set_yticks([2.0**power for power in shown], [_times(power) for power in shown])
    panel.minorticks_off()


def _line(products: list[Product], matrix: str, way: str) -> tuple[list[float], list[float]]:
    there = sorted(
        (product.batch, product.ratios[way])
        for product in products
        if product.matrix == matrix and way in product.ratios
    )
    return [batch for batch, _ in there], [ratio for _, ratio in there]


def _draw_shares(
    panel: Axes, products: list[Product], looks: dict[str, dict[str, Any]], highest: float
) -> None:
    from matplotlib.ticker import PercentFormatter

    for matrix, look in looks.items():
        there = sorted((product.batch, product.share) for product in products if product.matrix == matrix)
        panel.plot([batch for batch, _ in there], [share for _, share in there], label=matrix, **look)
    panel.set_ylim(0, 1.15 * highest or 1)
    panel.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def _set_batches(panel: Axes, products: list[Product]) -> None:
    """The x axis, with every batch on it whose number does not touch the one before."""
    batches = sorted({product.batch for product in products})
    low, high = batches[0] / 1.4, batches[-1] * 1.4
    shown: list[float] = []
    for batch in batches:
        if not shown or math.log(batch / shown[-1]) > 0.16 * math.log(high / low):
            shown.append(batch)
    panel.set_xscale("log", base=2)
    panel.set_xlim(low, high)
    panel.set_xticks(shown, [f"{batch:g}" for batch in shown])
    panel.minorticks_off()


def generation_figure(record: dict[str, Any], results: dict[str, Any]) -> Figure:
    """A panel for every stage, as in the paper's Fig. 4, with a pair of bars for every shape."""
    from matplotlib.patches import Patch

    rates = [_rate(shape, result) for shape, result in results.items()]
    names = [_name(rate) for rate in rates]
    some_layers = any(rate.layers < rate.layers_of_the_model for rate in rates)
    labels = 0.15 + 0.14 * max(name.count("\n") + 1 for name in names)
    down, across = (1, 3) if len(rates) <= MOST_ABREAST else (3, 1)
    figure, axes = _panels(
        Layout(down, across, WIDTH, 2.2, labels + 0.3, 0.42, labels),
        "Generation with dense and with ternary weights",
        f"{_measured(record, results)}; batch 1; tokens: {_common(results, 'tokens')}",
        [Patch(color=colour, label=kind) for kind, colour in BARS.items()],
        [SOME_LAYERS, _command(record)] if some_layers else [_command(record)],
    )
    panels = [panel for row in axes for panel in row]
    for i, (panel, (stage, what)) in enumerate(zip(panels, STAGES.items(), strict=True)):
        _draw_pairs(panel, [(rate.dense[i], rate.ternary[i], rate.ratios[i]) for rate in rates])
        panel.set_title(f"{stage}: {what}", fontweight="bold", loc="left")
        panel.set_xticks(range(len(rates)), names)
        if i % across == 0:
            panel.set_ylabel("tokens a second")
    return figure


def _rate(shape: str, result: dict[str, Any]) -> Rate:
    dense, ternary, ratios = (
        tuple(_number(result[kind][stage]) for stage in STAGES)
        for kind in ("dense", "ternary", "ternary_over_dense")
    )
    return Rate(shape, result["layers"], result["layers_of_the_model"], dense, ternary, ratios)


def _draw_pairs(panel: Axes, pairs: list[tuple[float, float, float]]) -> None:
    """Bars of dense and ternary, their numbers, and the ratio above both."""
    for x, (dense, ternary, ratio) in enumerate(pairs):
        for place, value, colour in zip((x - 0.21, x + 0.21), (dense, ternary), BARS.values(), strict=True):
            panel.bar(place, value, 0.4, color=colour)
            _write_above(panel, place, value, 2, _short(value), fontsize=6, color=GREY)
        _write_above(panel, x, max(dense, ternary), 11, f"{ratio:.2f}×", fontweight="bold")
    panel.grid(False)  # every bar has its number
    panel.set_xlim(-0.52, len(pairs) - 0.48)
    panel.set_ylim(0, 1.2 * max(max(pair[:2]) for pair in pairs))
    panel.tick_params(axis="x", length=0)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")


def _write_above(panel: Axes, x: float, y: float, points: float, text: str, **look: Any) -> None:
    panel.annotate(text, (x, y), (0, points), textcoords="offset points", ha="center", va="bottom", **look)


def _name(rate: Rate) -> str:
    """A shape in lines that fit under a pair of bars, with its layers if they are not all there."""
    lines = rate.shape.split("-")
    if rate.layers < rate.layers_of_the_model:
        lines += [f"{rate.layers} of {rate.layers_of_the_model}", "layers"]
    return "\n".join(lines)


def _panels(
    layout: Layout, title: str, subtitle: str, legend: list[Any], remarks: list[str]
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a heading, a legend, small remarks at its foot, and a grid of panels."""
    from matplotlib.figure import Figure

    width, down, across = layout.width, layout.down, layout.across
    # Lines by the mean width of a letter, and in the legend of what stands before and after an entry.
    heading = textwrap.wrap(subtitle, int(13 * width))
    legend_lines = math.ceil(sum(0.44 + 0.06 * len(entry.get_label()) for entry in legend) / (width - 0.2))
    footer = [line for remark in remarks for line in textwrap.wrap(remark, int(19.5 * width))]
    legend_top = 0.6 + 0.17 * (len(heading) - 1)
    top = HEADER + 0.17 * (len(heading) + legend_lines - 2)
    bottom = layout.labels + LINE * len(footer) + 0.2
    height = top + down * layout.height + (down - 1) * layout.below + bottom
    panel_width = (width - LEFT - RIGHT - (across - 1) * layout.between) / across
    figure = Figure(figsize=(width, height))
    figure.text(0.1 / width, 1 - 0.12 / height, title, fontsize=10.5, fontweight="bold", va="top")
    figure.text(0.1 / width, 1 - 0.36 / height, "\n".join(heading), fontsize=8.5, va="top")
    figure.text(0.1 / width, 0.08 / height, "\n".join(footer), fontsize=6.5, color=GREY, va="bottom")
    figure.legend(
        handles=legend,
        loc="upper left",
        bbox_to_anchor=(0.1 / width, 1 - legend_top / height),
        ncols=math.ceil(len(legend) / legend_lines),
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        columnspacing=1.4,
        handlelength=1.8,
    )
    axes = figure.subplots(
        down,
        across,
        squeeze=False,
        gridspec_kw={
            "left": LEFT / width,
            "right": 1 - RIGHT / width,
            "top": 1 - top / height,
            "bottom": bottom / height,
            "hspace": layout.below / layout.height,
            "wspace": layout.between / panel_width,
        },
    )
    return figure, axes.tolist()


def _measured(record: dict[str, Any], results: dict[str, Any]) -> str:
    """On what, in which dtype and when: a CPU's figures must not pass for those of a GPU."""
    machine, device = record["machine"], _common(results, "device")
    if device == "CPU":
        device = f"CPU: {machine['cpu']}, {machine['cores']} cores"
    return f"measured on {device}; {_common(results, 'dtype')}; {record['date']}"


def _command(record: dict[str, Any]) -> str:
    return f"{record['command']} (torch {record['machine']['versions']['torch']})"


def _common(results: dict[str, Any], key: str) -> str:
    """What all results of a run have in common; one heading cannot speak for several machines."""
    values = {str(result[key]) for result in results.values()}
    if len(values) > 1:
        raise ValueError(
            f"its results differ in {key} ({', '.join(sorted(values))}); draw each run by itself"
        )
    return values.pop()


def _number(value: Any, or_zero: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    if value < 0 or (value == 0 and not or_zero):
        raise ValueError(f"{value} is not above 0")
    return float(value)


def _short(value: float) -> str:
    """At most five characters, which is what fits above a bar."""
    if value >= 10_000:
        return f"{value / 1000:.3g}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _times(power: int) -> str:
    return f"{2**power}×" if power >= 0 else f"1/{2**-power}×"
