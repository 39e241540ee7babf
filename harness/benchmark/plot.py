"""Draw results of harness.benchmark as SVG, the same bytes at every run, so that they can be committed."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.benchmark.figures import GREY, generation_figure, products_figure
from harness.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # matplotlib brings it along
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "text.parse_math": False,  # a dollar in a command is one
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "svg.fonttype": "path",  # a reader may not have the font
    "svg.hashsalt": "pt2-llm",  # without one, names in the file are random
}


def draw(file: Path, target: Path | None = None) -> Path:
    """Draw what fits a file of results.

    Parameters
    ----------
    file : Path
        What ``harness.benchmark matmul`` or ``harness.benchmark generate`` wrote.
    target : Path, optional
        The SVG file to write; beside `file` if left out.

    Returns
    -------
    Path
        What was written.

    Raises
    ------
    UserError
        If there is no matplotlib, `file` is missing, damaged or of a kind without a plot, or nothing can be
        written.
    """
    if target is None:
        target = file.with_suffix(".svg") if file.suffix == ".json" else file.with_name(file.name + ".svg")
    if target.suffix != ".svg":
        raise UserError(f"plots are SVG files: give {target} a name that ends in .svg")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is missing or damaged: {error}") from None
    try:
        svg = svg_of(record)
    except (KeyError, TypeError, ValueError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{file} cannot be drawn: {what}") from None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(svg)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    return target


def draw_beside(file: Path) -> None:
    """Draw a file that was just measured; where that fails, say why.

    It is said on stderr, because stdout has the results as JSON.
    """
    try:
        print(f"plot: {draw(file)}", file=sys.stderr)
    except Exception as error:  # what took hours to measure is whole, whatever becomes of its plot
        print(f"no plot: {error}", file=sys.stderr)


def svg_of(record: Any) -> bytes:
    """The SVG file of a record of harness.benchmark; refusals are those of `figure_of`."""
    with _style():
        file = io.BytesIO()
        figure_of(record).savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()


def figure_of(record: Any) -> Figure:
    """The plot of a record of harness.benchmark.

    Raises
    ------
    KeyError, TypeError, ValueError
        If it is of a kind without a plot, or lacks something that the plot shows.
    """
    results: Any = record.get("results") if isinstance(record, dict) else None
    if _each_has(results, "products"):
        return products_figure(record, results)
    if _each_has(results, "dense", "ternary"):
        return generation_figure(record, results)
    raise ValueError("only results of harness.benchmark's matmul and generate have a plot")


def _each_has(results: Any, *keys: str) -> bool:
    return (
        isinstance(results, dict)
        and len(results) > 0
        and all(isinstance(result, dict) and result.keys() >= set(keys) for result in results.values())
    )


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's defaults and `STYLE`, whatever the user's own settings are."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots are drawn with the package matplotlib: pip install matplotlib") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield
