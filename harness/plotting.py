"""What all plots share: matplotlib's defaults, not the user's settings, and the same bytes in every run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "text.parse_math": False,  # a dollar sign in a name is literal
    "svg.hashsalt": "pt2-llm",  # without a salt, ids in the file are random
}


@contextmanager
def styled(style: dict[Any, Any]) -> Iterator[None]:
    """Draw with matplotlib's defaults, `STYLE`, and the caller's own settings.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**STYLE, **style})
        yield


def label_plainly(panel: Axes, axis: Axis, low: float, high: float) -> None:
    """Label a logarithmic axis that reaches from `low` to `high` with plain numbers."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1,) if high > 1000 * low else (1, 2, 5)))
    axis.set_major_formatter("{x:,g}")
    panel.minorticks_off()


def handles_of(panels: list[Axes]) -> tuple[list[Any], list[str]]:
    """Return the entries of a legend for several panels, each label once."""
    found: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    return list(found.values()), list(found)
