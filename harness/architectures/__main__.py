"""Try every architecture of transformers at a small size: python -m harness.architectures."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from harness.architectures.check import CAUSAL, DONE, FAILED, NOT_BUILT, TABLES, Outcome, check
from harness.cli import EXIT_MISS, HelpFormatter, add_verbose, path, run
from harness.errors import UserError
from harness.files import read_json, write_json
from harness.machine import environment
from harness.models.original import quiet_transformers

DESCRIPTION = """\
Build each architecture of AutoModelForCausalLM at a small size with random weights, ternarize it by the
paper's recipe, write it and read it back, compare its logits with those that calibration left, save it once
more and generate a few tokens. Prints what became of each, and fails if one was neither done nor refused.
With --auto AutoModelForImageTextToText, the same for models of images and text, which read text alone.

  python -m harness.architectures benchmarks/architectures.json
  python -m harness.architectures --auto AutoModelForImageTextToText
  python -m harness.architectures --only llama mixtral
  python -m harness.architectures benchmarks/architectures.json --only llama   # replaces its row in the file
"""


def line(outcome: Outcome) -> str:
    """Format an outcome for people."""
    share = "" if outcome.ternarized is None else f"{outcome.ternarized:.1%} of the layers' weights"
    more = f"; left as it is: {outcome.left}" if outcome.left else ""
    return f"{outcome.model_type:26} {outcome.outcome:10} {share}{outcome.reason}{more}"


def totals(rows: list[dict[str, Any]]) -> str:
    """Count the outcomes."""
    counts = Counter(row["outcome"] for row in rows)
    built = len(rows) - counts[NOT_BUILT]
    share = f", {counts[DONE] / built:.0%} of the {built} that could be built" if built else ""
    return ", ".join(f"{count} {name}" for name, count in counts.items()) + share


def row(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as it is written, without what it has not."""
    return {key: value for key, value in asdict(outcome).items() if value not in ("", None)}


def earlier_rows(file: Path, auto: str) -> list[dict[str, Any]]:
    """Read the rows of a file in which some are to be replaced.

    Raises
    ------
    UserError
        If the file is of another table or of other versions: the rows would not belong together.
    """
    earlier, here = read_json(file), environment()
    if earlier.get("versions") != here["versions"]:
        raise UserError(f"{file} is of other versions of Python or the libraries; drop --only to renew it")
    rows = earlier.get("architectures", [])
    if not {entry["model_type"] for entry in rows} <= set(TABLES[auto]):
        raise UserError(f"{file} is not of the table of {auto}; pass its --auto, or another file")
    return rows


def write(file: Path, auto: str, rows: list[dict[str, Any]]) -> None:
    """Write the outcomes, with the command, the date and the versions that they hold for."""
    table = "" if auto == CAUSAL else f" --auto {auto}"
    some = "" if len(rows) == len(TABLES[auto]) else " --only ..."
    described = {"command": f"python -m harness.architectures {file.name}{table}{some}", **environment()}
    date = datetime.now(UTC).date().isoformat()
    write_json(file, {**described, "date": date, "totals": totals(rows), "architectures": rows})


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.architectures", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    parser.add_argument("file", nargs="?", type=path, metavar="FILE", help="JSON file for the outcomes")
    parser.add_argument("--auto", choices=TABLES, default=CAUSAL, help="whose table is walked")
    parser.add_argument(
        "--only", nargs="+", metavar="TYPE", help="only these types; other rows of FILE stay, if it exists"
    )
    add_verbose(parser)
    arguments = parser.parse_args()
    types = arguments.only or list(TABLES[arguments.auto])
    for model_type in types:
        if model_type not in TABLES[arguments.auto]:
            parser.error(f"{model_type} is not in the table of {arguments.auto}")
    file, auto = arguments.file, arguments.auto
    kept = earlier_rows(file, auto) if arguments.only and file is not None and file.exists() else []
    quiet_transformers()
    torch.set_num_threads(1)  # the matrices are done before a second thread has woken up
    outcomes = []
    for model_type in tqdm(types, disable=None, leave=False):
        outcomes.append(check(model_type, auto))
        tqdm.write(line(outcomes[-1]))
    print(totals([row(outcome) for outcome in outcomes]))
    if file is not None:
        rows = {entry["model_type"]: entry for entry in (*kept, *map(row, outcomes))}
        write(file, auto, [rows[model_type] for model_type in TABLES[auto] if model_type in rows])
    return EXIT_MISS if any(outcome.outcome == FAILED for outcome in outcomes) else 0


if __name__ == "__main__":
    run(main)
