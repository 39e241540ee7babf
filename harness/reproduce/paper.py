"""The paper's own values, by table, model and row: ``paper.json``.

Values are those of arXiv 2510.03267: perplexities, accuracies in percent, bits per weight; in table 3
gigabytes, how many times smaller, and minutes. ``models`` holds names under which the models are known.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from harness.files import read_json


@cache
def contents() -> dict[str, Any]:
    """Return the contents of ``paper.json``."""
    return read_json(Path(__file__).with_name("paper.json"))


def model_of(source: str | None) -> str | None:
    """Return the paper's name of a model, by the last part of its id or folder; None for another model."""
    name = Path(source or "").name.lower()
    return next((model for model, names in contents()["models"].items() if name in names), None)


def rows_of(table: str, model: str | None) -> dict[str, dict[str, float | None]]:
    """Return the paper's rows of a table for a model, values by column; empty if it has none."""
    found = contents().get(table, {})
    return {
        row: dict(zip(found["columns"], values, strict=True)) for row, values in found.get(model, {}).items()
    }
