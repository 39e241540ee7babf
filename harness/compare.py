"""Show ternary checkpoints side by side: python -m harness.compare A B ..."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness import text
from harness.cli import HelpFormatter, add_trust_remote_code, add_verbose, model_name, path, refuse_idle, run
from harness.compute import Compute, default_compute
from harness.divergence import Divergence, divergence_on
from harness.errors import UserError
from harness.evaluate import add_text_options
from harness.files import json_text, read_json
from harness.hf import open_model
from harness.inspect import describe
from harness.models.folder import REPORT, read_config
from harness.models.loading import NO_GGUF, is_gguf, load_original
from harness.perplexity import Perplexity

DESCRIPTION = """\
Show ternary checkpoints side by side: sizes, bits per weight, the settings that differ, and the relative
output error of every layer, as report.json has it. With --original and --data, also how far their
predictions are from those of the original model.

  python -m harness.compare ternary-64 ternary-128
  python -m harness.compare ternary-* --original meta-llama/Llama-2-7b-hf --data wikitext2 --windows 8
"""

# Options that are no settings of the method, or that have rows of their own.
OTHER_OPTIONS = {"out", "force", "resume", "block_size", "grid"}


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint.

    Attributes
    ----------
    name : str
        Its folder.
    block_size, grid
        Columns of a block; type of the stored alpha and mu.
    bytes_on_disk : int
        Size of its weight files.
    bits : float
        Bits per weight of the ternary layers, with alpha, mu and permutations.
    report : dict, optional
        Its report.json; None if the folder has none.
    perplexity : Perplexity, optional
        If an original model was given.
    divergence : Divergence, optional
        From that model.
    """

    name: str
    block_size: int
    grid: str
    bytes_on_disk: int
    bits: float
    report: dict[str, Any] | None
    perplexity: Perplexity | None = None
    divergence: Divergence | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the run by name; empty without a report."""
        report = self.report or {}
        options = {**report.get("config", {}), **report.get("options", {})}
        found = {name: value for name, value in options.items() if name not in OTHER_OPTIONS}
        calibration = report.get("calibration", {})
        told = {"method": report.get("method"), "calibration text": calibration.get("text")}
        return {**told, **found} if report else {}

    @property
    def layer_errors(self) -> list[float]:
        """Relative output error of every layer; empty without a report."""
        try:
            return [float(layer["relative_output_error"]) for layer in (self.report or {}).get("layers", ())]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{Path(self.name) / REPORT} is damaged: a layer has no error") from None

    def to_json(self) -> dict[str, Any]:
        """Return the object for a JSON report."""
        found: dict[str, Any] = {
            "checkpoint": self.name,
            "block_size": self.block_size,
            "grid": self.grid,
            "bytes_on_disk": self.bytes_on_disk,
            "bits_per_weight": self.bits,
            "layer_errors": self.layer_errors,
        }
        if self.perplexity is not None:
            found["perplexity"] = asdict(self.perplexity)
        if self.divergence is not None:
            found["divergence"] = asdict(self.divergence)
        return found


def read_checkpoint(folder: Path, trust_remote_code: bool = False) -> Checkpoint:
    """Collect what a checkpoint's files say.

    Raises
    ------
    UserError
        If the folder is not a ternary checkpoint, or is damaged.
    """
    found = describe(folder, trust_remote_code)
    stored = read_config(folder)["quantization_config"]
    weights = sum(layer.rows * layer.columns for layer in found["layers"])
    packed = sum(size for kind, size in found["bytes"].items() if kind != "rest")
    report = read_json(folder / REPORT) if (folder / REPORT).is_file() else None
    bits = 8 * packed / weights
    return Checkpoint(
        str(folder), found["block_size"], stored.get("grid", "float16"), found["bytes_on_disk"], bits, report
    )


def differing_settings(checkpoints: list[Checkpoint]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all reports, by name; None where a report lacks one."""
    settings = [checkpoint.settings for checkpoint in checkpoints if checkpoint.report is not None]
    names = dict.fromkeys(name for found in settings for name in found)
    return {
        name: [checkpoint.settings.get(name) for checkpoint in checkpoints]
        for name in names
        if any(found.get(name) != settings[0].get(name) for found in settings)
    }


def table(checkpoints: list[Checkpoint]) -> list[str]:
    """Format checkpoints side by side, one column each."""
    rows = [["", *(c.name for c in checkpoints)]]
    rows.append(["weight files, bytes", *(f"{c.bytes_on_disk:,}" for c in checkpoints)])
    rows.append(["bits per weight", *(f"{c.bits:.3f}" for c in checkpoints)])
    rows.append(["columns of a block", *(str(c.block_size) for c in checkpoints)])
    rows.append(["alpha and mu in", *(c.grid for c in checkpoints)])
    if checkpoints[0].divergence is not None:
        figures = [c.divergence for c in checkpoints if c.divergence is not None]
        if any(c.perplexity for c in checkpoints):
            rows.append(["perplexity", *(f"{c.perplexity.value:.4g}" for c in checkpoints if c.perplexity)])
        rows.append(["KL divergence, mean", *(f"{d.mean:.4g}" for d in figures)])
        rows.append(["KL divergence, 99th percentile", *(f"{d.percentile_99:.4g}" for d in figures)])
        rows.append(["same most likely token or label", *(f"{d.agreement:.1%}" for d in figures)])
        rows.append(["predictions compared", *(f"{d.tokens:,}" for d in figures)])
    for name, values in differing_settings(checkpoints).items():
        rows.append([name, *("" if value is None else str(value) for value in values)])
    errors = [c.layer_errors for c in checkpoints]
    for layer in range(max(map(len, errors))):
        cells = (f"{e[layer]:.5f}" if layer < len(e) else "" for e in errors)
        rows.append([f"output error of layer {layer}", *cells])
    if any(errors):
        means = (f"{sum(e) / len(e):.5f}" if e else "" for e in errors)
        rows.append(["output error, mean of layers", *means])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, *_notes(checkpoints)]


def _notes(checkpoints: list[Checkpoint]) -> Iterator[str]:
    for checkpoint in checkpoints:
        if checkpoint.report is None:
            yield f"{checkpoint.name} has no {REPORT}: its settings and errors are not known"
    reports = [checkpoint.report for checkpoint in checkpoints if checkpoint.report is not None]
    for what, entries in (
        ("different models", [report.get("model") for report in reports]),
        ("different targets", [report.get("calibration", {}).get("targets") for report in reports]),
        ("different texts", [report.get("calibration", {}).get("windows_checksum") for report in reports]),
    ):
        if any(entry != entries[0] for entry in entries):
            yield f"output errors are of {what}: they do not rank these checkpoints"


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.compare", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", type=path, metavar="PATH", help="ternary checkpoints")
    parser.add_argument(
        "--original",
        type=model_name,
        metavar="MODEL",
        help="compare predictions with those of this model; two models must fit in memory",
    )
    add_text_options(parser, "text to compare predictions on")
    add_trust_remote_code(parser)
    add_verbose(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def main() -> int:
    """Run the command line."""
    arguments = parser().parse_args()
    if (arguments.original is None) != (arguments.data is None):
        raise UserError("predictions are compared with an original on a text; pass --original and --data")
    options = ("text_column", "seqlen", "windows", "bos", "cpu")
    idle = dict.fromkeys(options, "without --original") if arguments.original is None else {}
    if arguments.original is None or not is_gguf(arguments.original):
        idle["gguf_dtype"] = NO_GGUF
    refuse_idle(parser(), arguments, idle)
    trusted = arguments.trust_remote_code
    checkpoints = [read_checkpoint(folder, trusted) for folder in arguments.checkpoints]
    if arguments.original is not None:
        text.require_rows(arguments.text_column, arguments.data)
        stream = text.read_text(arguments.data, text.EVALUATION, arguments.text_column)
        original = load_original(arguments.original, arguments.gguf_dtype, trusted)
        compute = Compute() if arguments.cpu else default_compute()
        for index, checkpoint in enumerate(checkpoints):
            model = open_model(checkpoint.name, dense=True, trust_remote_code=trusted)
            perplexity, found = divergence_on(
                original, model, stream, arguments.seqlen, arguments.windows, compute, bos=arguments.bos
            )
            checkpoints[index] = replace(checkpoint, perplexity=perplexity, divergence=found)
    if arguments.json:
        differing = differing_settings(checkpoints)
        print(json_text({"checkpoints": [c.to_json() for c in checkpoints], "differing_settings": differing}))
    else:
        print("\n".join(table(checkpoints)))
    return 0


if __name__ == "__main__":
    run(main)
