"""Turn a record into the page report.html."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from harness.machine import duration
from harness.page import figures, tally
from harness.page.kinds import short_names
from harness.words import counted

# What a page may have at most; the table of layers is left out before it gets larger.
MOST_BYTES = 1_000_000
# How lone surrogates are written, which file names can have that are not Unicode.
SURROGATES = "backslashreplace"
# Matrices in the list of the worst.
WORST = 20


@dataclass(frozen=True)
class Shade:
    """A cell of the table of layers: its figure, how dark it is (0 to 1), and what it says when asked."""

    text: str
    depth: float
    title: str


def page(record: dict[str, Any]) -> str:
    """Draw the report of a run.

    Parameters
    ----------
    record : dict
        The contents of report.json, or of the progress.json of a run that has not ended.

    Returns
    -------
    str
        HTML that refers to nothing outside itself, at most `MOST_BYTES` long in UTF-8. Without matplotlib it
        has tables only, and says so.

    Raises
    ------
    KeyError, TypeError, ValueError
        If the record lacks what every record has.
    """
    try:
        plots, missing = figures.plots(record), False
    except ImportError:
        plots, missing = {}, True
    content = {
        "record": record,
        "plots": plots,
        "matplotlib_missing": missing,
        "title": f"{record['model']}, {'ternary' if is_ternary(record) else 'quantized'}",
        "tiles": tiles(record),
        "notes": notes(record),
        "done": done(record),
        "quality": quality(record),
        "sizes": sizes(record),
        "worst": tally.worst(record, WORST),
        "matrices": len(tally.matrices(record)),
        "seconds": tally.stage_seconds(record),
        "total": sum(record["seconds"].values()),
        "reordered": any(before != after for before, after in tally.variances(record).values()),
        "shift_stored": record["config"].get("shift") != "none",
    }
    template = _environment().get_template("template.html")
    html = template.render(content, table=layer_table(record))
    size = len(html.encode(errors=SURROGATES))
    return html if size <= MOST_BYTES else template.render(content, table=({}, []))


def write_page(record: dict[str, Any], file: Path) -> None:
    """Draw the report of a run into a file; it is either the old one or the complete new one."""
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(page(record), encoding="utf-8", errors=SURROGATES, newline="\n")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def is_ternary(record: dict[str, Any]) -> bool:
    """Whether the run made a ternary model; a baseline does not."""
    return any("weight_errors" in row for row in tally.matrices(record))


def is_finished(record: dict[str, Any]) -> bool:
    """Whether every layer was fitted."""
    return "mean_relative_output_error" in record


def tiles(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that matter most: what, how much, and beside what."""
    found = [("bits per weight", f"{record['bits_per_weight']:.3f}", "with alpha, mu and order")]
    before, after = record.get("original_bytes"), record.get("checkpoint_bytes")
    if after is not None:
        beside = f"original {megabytes(before)}, {before / after:.1f} × as much" if before else ""
        found.append(("weights on disk", megabytes(after), beside))
    perplexity = record["perplexity"]
    if "after" in perplexity:
        beside = f"original {_figure(perplexity['before']['value'])}" if "before" in perplexity else ""
        found.append(("perplexity", _figure(perplexity["after"]["value"]), beside))
    if divergence := record.get("divergence"):
        beside = f"same next token {divergence['agreement']:.1%}"
        found.append(("KL divergence, nats", _figure(divergence["mean"]), beside))
    if is_finished(record):
        error = float(record["mean_relative_output_error"])
        found.append(("output error", percent(error), "mean of the layers"))
    memory = record.get("peak_memory_bytes")
    beside = f"peak memory {memory / 1e9:.1f} GB" if memory else ""
    found.append(("time", duration(sum(record["seconds"].values())), beside))
    return found


def notes(record: dict[str, Any]) -> list[str]:
    """What a reader should know first: what is unfinished, missing or unusual."""
    found = []
    layers, rows = record["layers"], tally.matrices(record)
    if not is_finished(record):
        found.append(f"The run has not ended: {counted(len(layers), 'layer')} finished.")
    calibration = record["calibration"]
    wanted = calibration["nsamples"] * calibration["seqlen"]
    if calibration["tokens"] < wanted:
        found.append(
            f"The calibration text has {calibration['tokens']:,} tokens, fewer than the {wanted:,} "
            "requested: windows overlap."
        )
    plan = record.get("plan", {})
    found += [f"Left as it is: {plan[part]}." for part in ("not_understood", "skipped") if plan.get(part)]
    experts = [layer["experts"] for layer in layers if "experts" in layer]
    if experts:
        idle, few = (sum(row[name] for row in experts) for name in ("without_tokens", "filled_up"))
        total = sum(row["matrices"] for row in experts)
        if idle or few:
            found.append(
                f"Of {total:,} matrices of experts, {few:,} got fewer tokens than they have columns, "
                f"{idle:,} got none: these are fitted to average tokens too."
            )
    dead = sum(row.get("dead_inputs", 0) > 0 for row in rows)
    if dead:
        found.append(f"{dead:,} of {len(rows):,} matrices have inputs that are 0 for every token.")
    raised = sum(tally.is_raised(row, record) for row in rows)
    if raised:
        found.append(f"The damping of {counted(raised, 'matrix', ',')} had to be raised.")
    lost = sum(row.get("lost_blocks", 0.0) > tally.LOST_SHARE for row in rows)
    if lost:
        found.append(
            f"Blocks of {counted(lost, 'matrix', ',')} have an alpha that is too small to be stored."
        )
    if resumed := record.get("resumed_after"):
        found.append(f"The run was resumed after layer {_listed(resumed)}.")
    return found


def done(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What was done, as names and values."""
    calibration, plan, config = record["calibration"], record.get("plan", {}), record["config"]
    recipe = record["options"].get("recipe")
    method = "PT²-LLM" if is_ternary(record) else record["method"]
    found = [
        ("method", f"{method}, recipe {recipe}" if recipe else method),
        ("original", f"{record['model']}, {record['dtype']}"),
    ]
    if plan:
        share = plan["weights"] / plan["layer_weights"]
        weights = f"{plan['weights'] / 1e6:,.1f} M weights in {counted(plan['matrices'], 'matrix', ',')}"
        found.append(("ternarized", f"{weights}, {share:.1%} of the decoder layers"))
    grid = f", alpha and mu in {config['grid']}" if "grid" in config else ""
    windows = f"{counted(calibration['nsamples'], 'window', ',')} of {calibration['seqlen']:,} tokens"
    found += [
        ("blocks", f"{config['block_size']} columns{grid}"),
        ("calibration", f"{windows}; {calibration['text']}; {calibration['bos']}"),
        ("fitted to", _TARGETS.get(calibration["targets"], calibration["targets"])),
        ("computed", f"on the {record['backend']} backend, layers in {calibration['computed_in']}"),
        ("device", f"{record['device']}, {counted(record['cores'], 'core')}, {record['machine']}"),
        ("started", record["created"].replace("T", " ").replace("+00:00", " UTC")),
    ]
    return found


_TARGETS = {
    "weights": "the matrices' own weights",
    "outputs": "what the matrices output in the original",
    "stream": "the original's outputs, and its residual stream where a matrix adds to it",
}


def quality(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the table of quality: a measure, the original's value, and the new one."""
    before, after = (record["perplexity"].get(when, {}).get("value") for when in ("before", "after"))
    found = [("perplexity", _figure(before), _figure(after))] if (before, after) != (None, None) else []
    if divergence := record.get("divergence"):
        found += [
            ("KL divergence, mean", "0", _figure(divergence["mean"])),
            ("KL divergence, 99th percentile", "0", _figure(divergence["percentile_99"])),
            ("same most likely token", "100%", f"{divergence['agreement']:.1%}"),
        ]
    return found


def sizes(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the table of sizes: what, its bytes, and its bits per weight."""
    found = []
    if original := record.get("original_bytes"):
        found.append(("original weights", f"{original:,}", ""))
    if plan := record.get("plan"):
        bits = f"{8 * plan['packed_bytes'] / plan['weights']:.3f}"
        found.append(("ternary matrices", f"{plan['packed_bytes']:,}", bits))
        found.append(("embeddings, head, norms and biases", f"{plan['other_bytes']:,}", ""))
    if stored := record.get("checkpoint_bytes"):
        found.append(("weight files of the checkpoint", f"{stored:,}", ""))
    return found


def layer_table(record: dict[str, Any]) -> tuple[dict[str, str], list[tuple[int, str, list[Shade | None]]]]:
    """The relative output errors, in percent, by layer and kind.

    Returns
    -------
    kinds : dict of str to str
        Kinds of matrices and their short names, the columns.
    rows : list
        Layer, its error, and a cell for every kind, or None if the layer has none.
    """
    cells, kinds = tally.cells(record), tally.kinds(record)
    largest = max((cell.error for cell in cells.values() if math.isfinite(cell.error)), default=0.0)
    rows = [
        (
            layer["layer"],
            _percents(tally.error_of(layer)),
            [_shade(cells.get((layer["layer"], kind)), largest) for kind in kinds],
        )
        for layer in record["layers"]
    ]
    return short_names(kinds), rows


def _shade(cell: tally.Cell | None, largest: float) -> Shade | None:
    if cell is None:
        return None
    depth = min(cell.error / largest, 1.0) if largest > 0 and math.isfinite(cell.error) else 1.0
    title = ""
    if len(cell.rows) > 1:
        errors = sorted(map(tally.error_of, cell.rows))
        worst = cell.worst["name"]
        title = f"{counted(len(errors), 'matrix')}, {percent(errors[0])} to "
        title += f"{percent(errors[-1])} ({worst})"
    return Shade(_percents(cell.error), depth, title)


def percent(share: float) -> str:
    """Format a share in percent, with two digits that count."""
    return f"{_percents(share)}%"


def _percents(share: float) -> str:
    if not math.isfinite(share):
        return str(share)
    value = 100 * share
    return f"{value:.1f}" if value >= 9.95 or value == 0 else f"{value:#.2g}"


def megabytes(size: int) -> str:
    """Format bytes in MB, or GB."""
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"


def _figure(value: Any) -> str:
    """Format a number as the end of a run prints it; a missing one is empty."""
    return "" if value is None else f"{float(value):.4g}"


def _listed(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


def _shown(value: Any) -> str:
    """Format a setting."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "–" if value is None else str(value)


def _breakable(name: str) -> Markup:
    """Let a long name continue on the next line after a dot or an underscore."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(name))))


def _environment() -> Environment:
    """The templates of this folder; every value that they print is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "setting": _shown, "breakable": _breakable}
    return environment
