"""The record of a command: its tables with the figures of their cells, the contents of reproduce.json."""

from __future__ import annotations

from typing import Any

from harness.compute import default_compute
from harness.machine import provenance
from harness.reproduce import paper
from harness.reproduce.cells import Cells
from harness.reproduce.settings import Settings
from harness.reproduce.tables import QUALITY, RATES, SIZES, STAGES, TABLES, Cell
from harness.words import counted

# The figures of a cell that a table shows.
SHOWN = {
    QUALITY: ("bits_per_weight", "texts", "tasks", "iterations", "error"),
    SIZES: ("bits_per_weight", "bytes", "seconds", "cpu_seconds", "texts", "error"),
    STAGES: ("stages", "error"),
    RATES: ("prefill", "decode", "both", "bytes", "error"),
}
SHOWN_OF_TEXTS = ("perplexity", "mean", "percentile_99", "agreement")


def record_of(names: list[str], settings: Settings, cells: Cells) -> dict[str, Any]:
    """Collect the tables whose cells are all measured.

    Parameters
    ----------
    names : list of str
        Keys of `TABLES`.
    settings : Settings
        Settings of the command.
    cells : Cells
        The cells.

    Returns
    -------
    dict
        Command, date, machine and device; model and protocol; and ``results``, the rows of every table.
    """
    found = {name: table for name in names if (table := _table(name, settings, cells)) is not None}
    return {
        **provenance("harness.reproduce"),
        "device": default_compute().describe(),
        "model": cells.model_name,
        "protocol": _protocol(names, settings, cells),
        "results": found,
    }


def _table(name: str, settings: Settings, cells: Cells) -> dict[str, Any] | None:
    table, rows = TABLES[name], []
    published = paper.rows_of(name, settings.paper_model)
    for row in table.rows(settings):
        figures = cells.find(row.cell)
        if figures is None:
            return None
        shown = {key: figures[key] for key in SHOWN[table.shows] if key in figures}
        if "texts" in shown:
            shown["texts"] = {
                label: {key: found[key] for key in SHOWN_OF_TEXTS if key in found}
                for label, found in shown["texts"].items()
            }
        rows.append({"label": row.label, "method": row.cell.method, **shown})
        if row.paper in published:
            rows[-1]["paper"] = published.pop(row.paper)
    rows += [{"label": label, "paper": values} for label, values in published.items()]
    return {"title": table.title, "shows": table.shows, "rows": rows}


def _protocol(names: list[str], settings: Settings, cells: Cells) -> dict[str, Any]:
    """Say what the tables' figures depend on; of a text that no cell was measured on, nothing."""
    rows = [row for name in names for row in TABLES[name].rows(settings)]
    measured: dict[Cell, dict[str, Any]] = {
        row.cell: figures for row in rows if (figures := cells.find(row.cell)) is not None
    }
    texts = {
        label: found["protocol"]
        for figures in measured.values()
        for label, found in figures.get("texts", {}).items()
        if "protocol" in found
    }
    calibrated = {
        figures["calibration"]: None
        for cell, figures in measured.items()
        if cell.calibration == settings.calibration[0] and "calibration" in figures
    }
    protocol: dict[str, Any] = {"evaluation": texts}
    if calibrated:
        windows = f"{counted(settings.samples, 'window')} of {settings.seqlen} tokens"
        protocol["calibration"] = f"{windows}; {'; '.join(calibrated)}"
    if any(TABLES[name].shows == RATES for name in names):
        lengths = settings.lengths
        protocol["tokens"] = f"{lengths.prefill} read, {lengths.decode} written"
    return protocol
