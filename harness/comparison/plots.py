"""The style of plots in files; every run writes the same bytes, so plots can be committed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from harness.plotting import styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, distinguishable with any kind of colour blindness, and markers for print without
# colour. A layer has at most six kinds of products.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#595959"

STAGES = {"prefill": "reading the prompt", "decode": "writing after it", "both": "end to end"}

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # bundled with matplotlib
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.edgecolor": GREY,
    "grid.color": "#E3E3E3",
    "lines.markersize": 4,
    "svg.fonttype": "path",  # readers may lack the font
}


def svg_of(draw: Callable[[], Figure]) -> bytes:
    """Draw a figure in the common style, and return it as SVG.

    Raises
    ------
    UserError
        If matplotlib is not installed.
    """
    svg = io.BytesIO()
    try:
        with styled(STYLE):
            draw().savefig(svg, format="svg", metadata={"Date": None})
    except ImportError:
        raise UserError("plots need matplotlib: pip install matplotlib") from None
    return svg.getvalue()


def write_svg(target: Path, svg: bytes) -> None:
    """Write an SVG file.

    Raises
    ------
    UserError
        If it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(svg)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
