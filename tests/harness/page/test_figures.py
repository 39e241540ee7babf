"""Plots show the numbers of their record."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.page import figures
from tests.harness.page.records import DENSE, record_of


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return record_of(layers=4)


def panel_of(figure: Figure | None) -> Axes:
    assert figure is not None
    return figure.axes[0]


def rows_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [matrix for layer in record["layers"] for matrix in layer["matrices"]]


def test_weight_errors_are_medians_at_every_half_step_and_after_aga(record: dict[str, Any]) -> None:
    lists = [matrix["weight_errors"] for matrix in rows_of(record)]
    most = max(map(len, lists))
    steps = [np.median([errors[min(step, len(errors) - 1)] for errors in lists]) for step in range(most)]
    panel = panel_of(figures.draw_weight_errors(record))
    line = panel.lines[0]
    assert line.get_xdata().tolist() == [step / 2 for step in range(most)]
    assert line.get_ydata() == pytest.approx(steps)
    aligned = [matrix["aligned_weight_error"] for matrix in rows_of(record)]
    assert panel.lines[1].get_ydata() == pytest.approx([np.median(aligned)])
    assert panel.get_xticklabels()[-1].get_text() == "AGA"


def test_output_errors_are_medians_of_three_stages(record: dict[str, Any]) -> None:
    panel = panel_of(figures.draw_output_errors(record))
    for place, stage in enumerate(("init", "itf", "aga")):
        expected = np.median([matrix["output_errors"][stage] for matrix in rows_of(record)])
        assert panel.lines[0].get_ydata()[place] == pytest.approx(expected)
    assert [label.get_text() for label in panel.get_xticklabels()] == ["start", "ITF", "AGA"]


def test_errors_of_layers_are_those_of_the_record(record: dict[str, Any]) -> None:
    line = panel_of(figures.draw_layers(record)).lines[0]
    assert line.get_ydata() == pytest.approx([layer["relative_output_error"] for layer in record["layers"]])


def test_bars_of_trits_are_their_shares(record: dict[str, Any]) -> None:
    panel = panel_of(figures.draw_trits(record))
    assert [label.get_text() for label in panel.get_yticklabels()] == [kind.split(".")[1] for kind in DENSE]
    for place, kind in enumerate(DENSE):
        counts = np.sum([m["trits"] for m in rows_of(record) if m["name"].endswith(kind)], axis=0)
        widths = [bars[place].get_width() for bars in panel.containers]
        assert widths == pytest.approx(100 * counts / counts.sum())


@pytest.mark.parametrize("entry", ["alpha", "mu"])
def test_ridges_have_the_heights_of_the_histograms(record: dict[str, Any], entry: str) -> None:
    panel = panel_of({"alpha": figures.draw_alpha, "mu": figures.draw_mu}[entry](record))
    for place, kind in enumerate(DENSE):
        counts = np.sum([layer["grid"][kind][entry]["counts"] for layer in record["layers"]], axis=0)
        first = record["layers"][0]["grid"][kind][entry]["first"]
        tops, edges, baseline = panel.patches[2 * place].get_data()
        assert (baseline - tops) / (baseline - tops).max() == pytest.approx(counts / counts.max())
        assert edges[0] == (2 ** (first / 4) if entry == "alpha" else first / 8)
        assert len(edges) == len(counts) + 1


def test_variance_is_drawn_only_where_columns_moved(record: dict[str, Any]) -> None:
    panel = panel_of(figures.draw_variance(record))
    before, after = (line for line in panel.lines if line.get_marker() == "o")
    first = rows_of(record)[:: len(DENSE)]
    pairs = [[matrix[f"variance_{when}"] for matrix in first] for when in ("before", "after")]
    for line, values in zip((before, after), pairs, strict=True):
        assert line.get_xdata()[0] == pytest.approx(np.exp(np.mean(np.log(values))))
    still = record_of(layers=2)
    for matrix in rows_of(still):
        matrix["variance_after"] = matrix["variance_before"]
    assert figures.draw_variance(still) is None


def test_bars_of_time_are_the_seconds_of_the_stages(record: dict[str, Any]) -> None:
    panel = panel_of(figures.draw_time(record))
    assert {bars.get_label(): bars[3].get_height() for bars in panel.containers} == record["layers"][3][
        "seconds"
    ]


def test_a_plot_is_the_same_in_every_run(record: dict[str, Any], with_plots: None) -> None:
    first, second = (figures.plots(record)["mu"].svg for _ in range(2))
    assert first == second
    assert first.startswith('<svg role="img" aria-label="mu" viewBox=')
