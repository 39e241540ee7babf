"""The rows of the paper's tables and figures, and of what is measured beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.reproduce.peers import PEERS
from harness.reproduce.settings import Settings
from harness.text import DATA_SETS
from harness.words import counted

# What is measured of a cell.
QUALITY, SPEED = "quality", "speed"
# What a table shows of its cells.
SIZES, STAGES, RATES = "sizes", "stages", "rates"

ORIGINAL, PAPER, BEST = "original", "pt2-llm", "best"


@dataclass(frozen=True)
class Cell:
    """One model to measure: the original, or what a method makes of it.

    Attributes
    ----------
    method : str
        A key of `harness.comparison.methods.METHODS`, a name of `harness.reproduce.peers.PEERS`, or
        `ORIGINAL`.
    samples : int
        Calibration windows.
    calibration : str
        Calibration text.
    measured : {"quality", "speed"}
        Whether predictions or tokens per second are measured.
    """

    method: str
    samples: int
    calibration: str
    measured: str = QUALITY


@dataclass(frozen=True)
class Row:
    """A row: its label, its cell, and the label of the paper's row in ``paper.json``, if there is one."""

    label: str
    cell: Cell
    paper: str | None = None


@dataclass(frozen=True)
class Table:
    """A table or figure.

    Attributes
    ----------
    title : str
        What it shows.
    teaches : str
        What the paper has there and what is added, for the help.
    rows : callable
        Returns its rows for settings.
    shows : {"quality", "sizes", "stages", "rates"}
        Which columns it has.
    """

    title: str
    teaches: str
    rows: Callable[[Settings], list[Row]]
    shows: str = QUALITY


def _on_first_text(settings: Settings, *rows: tuple[str, str, str | None]) -> list[Row]:
    return [
        Row(label, Cell(method, settings.samples, settings.calibration[0]), paper)
        for label, method, paper in rows
    ]


def _methods(settings: Settings) -> list[Row]:
    peers = ((PEERS[name].words, name, None) for name in settings.peers)
    return _on_first_text(
        settings,
        ("original, 16 bits", ORIGINAL, "FP16"),
        ("round to nearest, 2 bits", "rtn-2bit", None),
        ("GPTQ, 2 bits, as its paper has it", "gptq-2bit", "GPTQ"),
        ("GPTQ, 2 bits, activation order and clipped grid", "gptq-2bit-best", None),
        *peers,
        ("PT²-LLM", PAPER, "PT²-LLM"),
        ("`best`", BEST, None),
    )


def _stages(settings: Settings) -> list[Row]:
    return _on_first_text(
        settings,
        ("no ITF, no AGA", "ssr-init-only", "no ITF, no AGA"),
        ("ITF, no AGA", "ssr-itf-only", "ITF"),
        ("AGA, no ITF", "ssr-aga-only", "AGA"),
        ("ITF + AGA", PAPER, "ITF + AGA"),
        ("ITF + AGA by Eq. 13 as printed", "eq13", None),
        ("ITF + AGA, symmetric initialization (Eq. 1-3)", "symmetric-start", None),
    )


def _orders(settings: Settings) -> list[Row]:
    return _on_first_text(
        settings,
        ("columns in their order", "no-order", "none"),
        ("columns in random order", "random", "random"),
        ("columns by the Hessian's diagonal", "hessian", "Hessian"),
        ("columns by SSR", PAPER, "SSR"),
    )


def _sizes_of_calibration(settings: Settings) -> list[Row]:
    counts = [max(1, settings.samples // 2), settings.samples, 2 * settings.samples]
    text = settings.calibration[0]
    return [
        Row(
            f"{words}{counted(count, 'window')}",
            Cell(method, count, text),
            str(count) if method == PAPER else None,
        )
        for words, method in (("", PAPER), ("`best`, ", BEST))
        for count in counts
    ]


def _texts_of_calibration(settings: Settings) -> list[Row]:
    return [
        Row(f"{words}{name}", Cell(method, settings.samples, text), name if method == PAPER else None)
        for words, method in (("", PAPER), ("`best`, ", BEST))
        for text in settings.calibration
        for name in [text_name(text)]
    ]


def _block_sizes(settings: Settings) -> list[Row]:
    return _on_first_text(
        settings,
        ("original, 16 bits", ORIGINAL, "FP16"),
        ("GPTQ, 2 bits, groups of 128", "gptq-2bit", "GPTQ"),
        ("PT²-LLM, blocks of 64", "pt2-llm-64", None),
        ("PT²-LLM, blocks of 128", PAPER, "PT²-LLM"),
        ("PT²-LLM, blocks of 256", "pt2-llm-256", None),
        ("`best`, blocks of 64", BEST, None),
        ("`best`, blocks of 128", "best-128", None),
        ("`best`, blocks of 256", "best-256", None),
    )


def _fitting(settings: Settings) -> list[Row]:
    return _on_first_text(
        settings, ("columns by SSR", PAPER, None), ("columns in their order", "no-order", None)
    )


def _rates(settings: Settings) -> list[Row]:
    named = (("original", ORIGINAL), ("PT²-LLM", PAPER), ("`best`", BEST))
    return [
        Row(label, Cell(method, settings.samples, settings.calibration[0], SPEED)) for label, method in named
    ]


def text_name(source: str) -> str:
    """Return the name of a text: that of its data set, or of its file."""
    name, colon, _ = source.partition(":")
    return name if name in DATA_SETS and colon else Path(source).name


TABLES = {
    "table1": Table(
        "Table 1: methods",
        "Perplexity on WikiText-2 and C4, with --tasks also zero-shot accuracy. The paper compares PT²-LLM "
        "with GPTQ, AWQ, QuIP, Slim-LLM and PB-LLM, whose values it prints. Measured here: the original, "
        "2-bit rounding, GPTQ as its paper has it and at its best, PT²-LLM, the recipe best, and --peers.",
        _methods,
    ),
    "table2a": Table(
        "Table 2a: ITF and AGA",
        "What the two steps of the quantizer are worth; here also the initialization by Eq. 1-3, and Eq. 13 "
        "as printed.",
        _stages,
    ),
    "table2b": Table(
        "Table 2b: order of the columns",
        "Columns in their order, random, by the Hessian's diagonal, and by SSR.",
        _orders,
    ),
    "table2c": Table(
        "Table 2c: size of the calibration set",
        "Half of --samples, --samples, and twice as many; here for best as well.",
        _sizes_of_calibration,
    ),
    "table2d": Table(
        "Table 2d: calibration text",
        "One row for each text of --calibration; here for best as well.",
        _texts_of_calibration,
    ),
    "table3": Table(
        "Table 3: size and time",
        "Size of the model, how many times smaller it is, and minutes to quantize it; here for blocks of 64, "
        "128 and 256 columns, with their quality.",
        _block_sizes,
        SIZES,
    ),
    "figure3": Table(
        "Figure 3: errors by stage, variance in blocks",
        "Error of the weights E_w after every half-step of ITF and after AGA, error of the outputs E_x after "
        "every stage, and variance in blocks before and after reordering, by layer.",
        _fitting,
        STAGES,
    ),
    "figure4": Table(
        "Figure 4: tokens per second",
        "Reading a prompt of 128 tokens, writing 256, and both. The paper compares llama.cpp's ternary and "
        "2-bit types on a GPU. Measured here: the original and ternary layers by this package, on this "
        "machine.",
        _rates,
        RATES,
    ),
}


def cells_of(names: list[str], settings: Settings) -> Iterator[Cell]:
    """Return the cells of tables, each once, in the order in which they are measured."""
    yield from dict.fromkeys(row.cell for name in names for row in TABLES[name].rows(settings))
