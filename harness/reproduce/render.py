"""Tables as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from harness.reproduce.tables import QUALITY, RATES, SIZES, STAGES
from harness.words import counted

# Names of the paper's columns, and of those that are not named by a text or task.
PAPER_COLUMNS = {"bits_per_weight": "bits", "gigabytes": "GB", "reduction": "times smaller"}

FAILED = "failed"

Value = str | float | int | None


def cells_of(table: dict[str, Any]) -> list[dict[str, Value]]:
    """Return the rows of a table with their values by column; None where there is none."""
    first = next((row["bytes"] for row in table["rows"] if "bytes" in row), None)
    rows = [dict(_values(row, table["shows"], first)) for row in table["rows"]]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    # The paper's values stand last, whichever row has them first.
    columns.sort(key=lambda column: column.startswith("paper: "))
    return [{column: row.get(column) for column in columns} for row in rows]


def _values(row: dict[str, Any], shows: str, original: int | None) -> Iterator[tuple[str, Value]]:
    yield "", row["label"]
    if "error" in row:
        yield FAILED, row["error"]
    if shows in (QUALITY, SIZES):
        yield "bits per weight", row.get("bits_per_weight")
    if shows == SIZES and "bytes" in row:
        yield "GB", row["bytes"] / 1e9
        yield "times smaller", original / row["bytes"] if original else None
        yield "minutes", row["seconds"] / 60 if "seconds" in row else None
        yield "CPU minutes", row["cpu_seconds"] / 60 if "cpu_seconds" in row else None
    for text, found in row.get("texts", {}).items():
        yield f"{text}: perplexity", found["perplexity"]
        yield f"{text}: KL", found["mean"]
    tasks = row.get("tasks", {})
    for task, found in tasks.items():
        if isinstance(found, dict) and task != "average":
            yield f"{task}, %", 100 * found[found["paper_metric"]]["value"]
    if tasks:
        yield "average, %", 100 * tasks["average"]["value"]
    if shows == STAGES and "stages" in row:
        stages = row["stages"]
        curve, outputs = stages["weight_errors"], stages["output_errors"]
        yield from (("E_w: start", curve[0]), ("ITF", curve[-1]), ("AGA", stages["aligned_weight_error"]))
        yield from (("E_x: start", outputs["init"]), ("ITF ", outputs["itf"]), ("AGA ", outputs["aga"]))
        yield "whole", outputs["whole"]
        for when, index in (("before", 0), ("after", 1)):
            pairs = stages["variance"]
            yield f"variance in blocks {when}", sum(pair[index] for pair in pairs) / len(pairs)
    if shows == RATES and "both" in row:
        yield from ((f"{stage}, tokens/s", row[stage]) for stage in ("prefill", "decode", "both"))
        yield "MB", row["bytes"] / 1e6
    for column, value in row.get("paper", {}).items():
        if value is not None:
            yield f"paper: {PAPER_COLUMNS.get(column, column)}", value


def shown(value: Value) -> str:
    """Format a value with three digits, or as many as it has before its point."""
    if value is None or isinstance(value, str):
        return value or ""
    if value == 0 or (value == int(value) and abs(value) < 1e5):
        return str(int(value))
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def csv_of(table: dict[str, Any]) -> str:
    """Format a table as CSV, with all digits."""
    rows = cells_of(table)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(column.strip() for column in rows[0])
    writer.writerows([["" if value is None else value for value in row.values()] for row in rows])
    return out.getvalue()


def markdown_table(table: dict[str, Any]) -> list[str]:
    """Format the rows of a table as lines of Markdown; why a method failed is not in them."""
    rows = cells_of(table)
    for row in rows:
        row.pop(FAILED, None)
    header = [column.strip() for column in rows[0]]
    lines = [header, ["---"] * len(header), *([shown(value) for value in row.values()] for row in rows)]
    return [f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in line)}|" for line in lines]


def markdown_of(record: dict[str, Any]) -> str:
    """Format a record as Markdown; the pictures are SVG files beside it, named after the tables."""
    protocol = record["protocol"]
    lines = [f"# {record['model']}", ""]
    lines += [f"`{record['command']}`, {record['date']}, on {_machine(record)}.", ""]
    if "calibration" in protocol:
        lines += [f"Calibration: {protocol['calibration']}.", ""]
    for text, words in protocol["evaluation"].items():
        lines += [f"Perplexity and KL divergence from the original (mean, nats), {text}: {words}.", ""]
    if "tokens" in protocol:
        lines += [f"Tokens of figure 4: {protocol['tokens']}.", ""]
    for name, table in record["results"].items():
        lines += [f"## {table['title']}", "", *markdown_table(table), ""]
        for row in table["rows"]:
            if "error" in row:
                lines += [f"{row['label']} failed: {row['error']}.", ""]
        lines += [f"![{table['title']}]({name}.svg)", ""]
    return "\n".join(lines).rstrip() + "\n"


def _machine(record: dict[str, Any]) -> str:
    machine, device = record["machine"], record["device"]
    return f"{machine['cpu']} ({counted(machine['cores'], 'core')})" if device == "CPU" else device
