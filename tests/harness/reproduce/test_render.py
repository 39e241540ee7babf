"""Markdown, CSV and plots hold the figures of the record."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
from matplotlib.figure import Figure

from harness.comparison.plots import STYLE, svg_of
from harness.plotting import styled
from harness.reproduce.plots import draw
from harness.reproduce.render import csv_of, markdown_table, shown
from harness.reproduce.stages import summarize_stages

QUALITY = {
    "title": "Table 9: some",
    "shows": "quality",
    "rows": [
        {"label": "a", "bits_per_weight": 16, "texts": {"w": {"perplexity": 19.131, "mean": 0.0}}},
        {"label": "`b`", "bits_per_weight": 1.903, "texts": {"w": {"perplexity": 713.09, "mean": 3.5469}}},
        {"label": "c", "error": "no inverse"},
        {"label": "d", "paper": {"wikitext2": 11.56, "c4": None}},
        {"label": "e", "bits_per_weight": 2.0, "texts": {"w": {"perplexity": "inf", "mean": "nan"}}},
    ],
}

SIZES = {
    "title": "sizes",
    "shows": "sizes",
    "rows": [
        {"label": "a", "bits_per_weight": 16, "bytes": 4_000_000_000},
        {"label": "b", "bits_per_weight": 2, "bytes": 500_000_000, "seconds": 90.0, "cpu_seconds": 30.0},
    ],
}


def test_markdown_rounds_and_csv_does_not() -> None:
    assert markdown_table(QUALITY) == [
        "| | bits per weight | w: perplexity | w: KL | paper: wikitext2 |",
        "| --- | --- | --- | --- | --- |",
        "| a | 16 | 19.1 | 0 | |",
        "| `b` | 1.90 | 713 | 3.55 | |",
        "| c | | | | |",
        "| d | | | | 11.6 |",
        "| e | 2 | inf | nan | |",
    ]
    first, second, third, *_ = csv.DictReader(io.StringIO(csv_of(QUALITY)))
    assert third["failed"] == "no inverse"
    assert (first["w: perplexity"], second["w: KL"]) == ("19.131", "3.5469")


def test_sizes_are_compared_with_the_first_row() -> None:
    _, row = csv.DictReader(io.StringIO(csv_of(SIZES)))
    assert [float(row[name]) for name in ("GB", "times smaller", "minutes", "CPU minutes")] == [
        0.5,
        8,
        1.5,
        0.5,
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (0.0304, "0.0304"), (1.5, "1.50"), (99.96, "100"), (713.1, "713"), (23355.4, "23355"),
        (1.81e6, "1.8e6"), (2.5e-7, "2.5e-7"), (None, ""), ("inf", "inf"), (128, "128"),
    ],
)  # fmt: skip
def test_values_have_three_digits(value: Any, text: str) -> None:
    assert shown(value) == text


def points(figure: Figure) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Points by panel and label."""
    return {
        panel.get_xlabel() or panel.get_ylabel(): {
            str(line.get_label()): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
            for line in panel.lines
        }
        for panel in figure.axes
    }


def test_dots_are_the_figures_of_the_rows() -> None:
    with styled(STYLE):
        drawn = points(draw(QUALITY))
    assert drawn["perplexity"] == {"w": [(19.131, 0), (713.09, 1)]}
    assert drawn["KL divergence from the original, nats"] == {"w": [(0.0, 0), (3.5469, 1)]}
    with styled(STYLE):
        assert points(draw(SIZES))["GB"] == {"this model": [(4.0, 0), (0.5, 1)]}


MATRICES = [
    {"weight_power": 1.0, "output_power": 3.0, "weight_errors": [0.5, 0.4, 0.1], "aligned_weight_error": 0.2,
     "output_errors": {"init": 0.6, "itf": 0.5, "aga": 0.3}, "relative_output_error": 0.1,
     "variance_before": 4.0, "variance_after": 2.0},
    {"weight_power": 3.0, "output_power": 1.0, "weight_errors": [0.3], "aligned_weight_error": 0.4,
     "output_errors": {"init": 0.2, "itf": 0.1, "aga": 0.1}, "relative_output_error": 0.5,
     "variance_before": 2.0, "variance_after": 1.0},
]  # fmt: skip


def test_errors_by_stage_are_sums_over_matrices() -> None:
    found = summarize_stages([{"matrices": MATRICES}, {"matrices": MATRICES[:1]}])
    # Powers 1, 3 and 1 of weights, and 3, 1 and 3 of outputs.
    assert found["weight_errors"] == pytest.approx([1.9 / 5, 1.7 / 5, 1.1 / 5])
    assert found["aligned_weight_error"] == pytest.approx(1.6 / 5)
    assert found["output_errors"] == pytest.approx(
        {"init": 3.8 / 7, "itf": 3.1 / 7, "aga": 1.9 / 7, "whole": 1.1 / 7}
    )
    assert found["variance"] == [[3.0, 1.5], [4.0, 2.0]]


def test_figure_3_shows_the_curves() -> None:
    stages = summarize_stages([{"matrices": MATRICES}])
    with styled(STYLE):
        figure = draw({"title": "t", "shows": "stages", "rows": [{"label": "x", "stages": stages}]})
    weights, outputs, variance = figure.axes
    assert list(weights.lines[0].get_ydata()) == stages["weight_errors"]
    assert list(outputs.lines[0].get_ydata()) == list(stages["output_errors"].values())
    assert list(variance.lines[0].get_ydata()) == [1.5]


def test_bars_of_figure_4_are_the_rates() -> None:
    rows = [
        {"label": label, "prefill": 10.0 * i, "decode": 3.0 * i, "both": 4.0 * i, "bytes": 9}
        for i, label in enumerate("ab", 1)
    ]
    with styled(STYLE):
        figure = draw({"title": "t", "shows": "rates", "rows": rows})
    heights = [[bar.get_height() for bar in panel.patches] for panel in figure.axes]
    assert heights == [[10.0, 20.0], [3.0, 6.0], [4.0, 8.0]]


def test_a_plot_is_the_same_at_every_run() -> None:
    assert svg_of(lambda: draw(QUALITY)) == svg_of(lambda: draw(QUALITY))
