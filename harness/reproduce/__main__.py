"""Measure the paper's tables and figures on any model: python -m harness.reproduce TABLE..."""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from harness import text
from harness.cli import (
    HelpFormatter,
    add_trust_remote_code,
    add_verbose,
    model_name,
    path,
    positive,
    refuse_idle,
    run,
    window_length,
)
from harness.comparison.plots import svg_of, write_svg
from harness.comparison.speed import Lengths
from harness.errors import UserError
from harness.evaluate import TASK_OPTIONS, task_names
from harness.files import write_json
from harness.machine import duration
from harness.models.folder import locked
from harness.models.gguf import GGUF_DTYPES
from harness.models.loading import MODEL_HELP, NO_GGUF, is_gguf
from harness.progress import say_on_stdout
from harness.quantize.options import BACKENDS
from harness.reproduce import paper
from harness.reproduce.cells import Cells
from harness.reproduce.peers import PEERS, require_installed
from harness.reproduce.plots import draw
from harness.reproduce.record import record_of
from harness.reproduce.render import csv_of, markdown_of
from harness.reproduce.settings import Settings
from harness.reproduce.tables import TABLES, cells_of
from harness.words import counted
from harness.zeroshot.tasks import TASKS

ALL = "all"
RECORD = "reproduce.json"

DESCRIPTION = """\
Measure the tables and figures of the paper on any model. Every cell is one quantized model, measured by
perplexity and by KL divergence from the original. Where the model is one of the paper's, its values stand
beside them.

{tables}

Each cell is kept in --out as soon as it is measured. A repeated command measures only what is missing: a
kill loses one cell, and tables share cells. As soon as a table is complete, it is in reproduce.json and
reproduce.md, which hold the tables of the last command, in a .csv, and in an .svg.

A cell takes as long as harness.quantize and two evaluations, plus one of the original to compare with. At the
paper's sizes a cell of SmolLM2-135M takes about an hour on two CPU cores; at the sizes of the second command
below, about two minutes.

  python -m harness.reproduce table1 --model meta-llama/Llama-2-7b-hf --out llama2
  python -m harness.reproduce all --samples 8 --seqlen 512 --eval-windows 8 --eval-seqlen 1024 \\
      --calibration wikitext2:wiki.train.raw --eval wikitext2:wiki.test.raw --out smollm2
"""


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    defaults = Settings()
    described = (
        textwrap.fill(
            f"{name:9}{counted(len(table.rows(defaults)), 'cell')}: "
            f"{table.title.partition(': ')[2]}. {table.teaches}",
            width=96,
            initial_indent="  ",
            subsequent_indent=" " * 11,
        )
        for name, table in TABLES.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m harness.reproduce",
        description=DESCRIPTION.format(tables="\n".join(described)),
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "tables", nargs="+", choices=(*TABLES, ALL), metavar="TABLE", help=f"{', '.join(TABLES)}, or {ALL}"
    )
    parser.add_argument("--model", type=model_name, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--out", type=path, default=Path("reproduction"), metavar="DIR", help="folder for cells and results"
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        default=list(defaults.calibration),
        metavar="TEXT",
        help=f"calibration texts: the first for all tables, all of them for table2d. {text.SOURCES_HELP}",
    )
    parser.add_argument(
        "--eval", nargs="+", default=list(defaults.texts), metavar="TEXT", help="texts to measure on"
    )
    parser.add_argument("--text-column", metavar="NAME", help="as for harness.quantize")
    parser.add_argument("--samples", type=positive, default=defaults.samples, help="calibration windows")
    parser.add_argument("--seqlen", type=window_length, default=defaults.seqlen, help="tokens per window")
    parser.add_argument(
        "--eval-windows", type=positive, metavar="N", help="measure only the first N windows of a text"
    )
    parser.add_argument(
        "--eval-seqlen", type=window_length, default=defaults.eval_seqlen, help="tokens per evaluation window"
    )
    parser.add_argument(
        "--tasks",
        type=task_names,
        default=[],
        metavar="TASKS",
        help=f"also measure zero-shot accuracy by lm-eval, separated by commas: {', '.join(TASKS)}, or {ALL}",
    )
    parser.add_argument("--tasks-dir", type=path, metavar="DIR", help="as for harness.evaluate")
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="ask only the first N questions of each task"
    )
    parser.add_argument("--batch-size", type=positive, default=defaults.batch_size, help="prompts at a time")
    lengths = defaults.lengths
    parser.add_argument("--prefill", type=positive, default=lengths.prefill, help="tokens that figure4 reads")
    parser.add_argument("--decode", type=positive, default=lengths.decode, help="tokens that figure4 writes")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=PEERS,
        default=[],
        metavar="PEER",
        help=f"other packages for table1, if installed: {', '.join(PEERS)}. Each is installed by the extra "
        "of its name; gptqmodel needs PyTorch 2.14.1, and hqq calibrates on nothing",
    )
    parser.add_argument(
        "--peer-iterations",
        type=positive,
        default=defaults.peer_iterations,
        metavar="N",
        help="steps of gradient descent that auto-round takes per layer; 200 is its default",
    )
    known = list(paper.contents()["models"])
    parser.add_argument(
        "--paper-model",
        choices=known,
        metavar="NAME",
        help="which of the paper's models MODEL is, if its name does not say so: " + ", ".join(known),
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="as for harness.quantize",
    )
    parser.add_argument(
        "--gguf-dtype", choices=GGUF_DTYPES, default="bfloat16", help="as for harness.quantize"
    )
    add_trust_remote_code(parser)
    add_verbose(parser)
    return parser


def main() -> int:
    """Run the command line."""
    arguments = parser().parse_args()
    names = list(TABLES) if ALL in arguments.tables else list(dict.fromkeys(arguments.tables))
    settings = _settings(arguments)
    require_installed(settings.peers)
    out: Path = arguments.out
    if out.is_file():
        raise UserError(f"{out} is a file; --out needs a folder")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        cells = Cells(out, settings)
        for _ in _measure(names, settings, cells):
            record = record_of(names, settings, cells)
            _write(out, record)
        print(markdown_of(record))
    return 0


def _write(out: Path, record: dict[str, Any]) -> None:
    """Write the tables of a record."""
    tables = record["results"]
    write_json(out / RECORD, record)
    (out / RECORD).with_suffix(".md").write_text(markdown_of(record), encoding="utf-8")
    for name, table in tables.items():
        (out / f"{name}.csv").write_text(csv_of(table), encoding="utf-8")
        write_svg(out / f"{name}.svg", svg_of(partial(draw, table)))


def _settings(arguments: argparse.Namespace) -> Settings:
    idle: dict[str, str] = {}
    if not arguments.tasks:
        idle |= dict.fromkeys(TASK_OPTIONS, "without --tasks")
    if not {"table1", ALL} & set(arguments.tables):
        idle["peers"] = "without table1, whose rows they are"
    if not any(PEERS[name].trains for name in arguments.peers):
        idle["peer_iterations"] = "without --peers auto-round"
    if not {"figure4", ALL} & set(arguments.tables):
        idle |= dict.fromkeys(("prefill", "decode"), "without figure4")
    if not is_gguf(arguments.model):
        idle["gguf_dtype"] = NO_GGUF
    refuse_idle(parser(), arguments, idle)
    text.require_rows(arguments.text_column, *arguments.calibration, *arguments.eval)
    return Settings(
        model=arguments.model,
        calibration=tuple(dict.fromkeys(arguments.calibration)),
        texts=tuple(dict.fromkeys(arguments.eval)),
        samples=arguments.samples,
        seqlen=arguments.seqlen,
        eval_seqlen=arguments.eval_seqlen,
        eval_windows=arguments.eval_windows,
        tasks=tuple(arguments.tasks),
        tasks_dir=arguments.tasks_dir,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        lengths=Lengths(arguments.prefill, arguments.decode),
        peers=tuple(dict.fromkeys(arguments.peers)),
        peer_iterations=arguments.peer_iterations,
        paper_model=arguments.paper_model or paper.model_of(arguments.model),
        text_column=arguments.text_column,
        backend=arguments.backend,
        gguf_dtype=arguments.gguf_dtype,
        trust_remote_code=arguments.trust_remote_code,
    )


def _measure(names: list[str], settings: Settings, cells: Cells) -> Iterator[str]:
    """Measure the cells that are missing, and yield each table as soon as it is complete."""
    wanted = list(cells_of(names, settings))
    missing = [cell for cell in wanted if cells.find(cell) is None]
    say_on_stdout(f"{counted(len(wanted), 'cell')}, {len(wanted) - len(missing)} of them already measured")
    began, done = time.monotonic(), 0
    for name in names:
        for cell in cells_of([name], settings):
            if cells.find(cell) is not None:
                continue
            spent = time.monotonic() - began
            left = f", about {duration(spent / done * (len(missing) - done))} left" if done else ""
            done += 1
            say_on_stdout(f"{name}: cell {done} of {len(missing)}{left}: {cells.describe(cell)}")
            cells.measure(cell)
            say_on_stdout(f"  {cells.summary(cell)}")
        yield name


if __name__ == "__main__":
    run(main)
