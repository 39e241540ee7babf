"""The paper's tables on a small model: measured once a cell, resumed, with the paper's values beside."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.calibration.methods import FitError
from harness.cli import EXIT_INTERRUPTED, EXIT_USAGE
from harness.evaluate import main as evaluate_main
from harness.quantize.__main__ import main as quantize_main
from harness.quantize.options import Options
from harness.reproduce import cells
from harness.reproduce.__main__ import main as reproduce_main
from harness.reproduce.cells import Cells
from tests.harness import tiny

Run = Callable[..., int]

SIZES = ("--samples", "8", "--seqlen", "24", "--eval-seqlen", "24", "--eval-windows", "3")


@pytest.fixture(scope="module")
def arguments(random_llama: Path, words_file: Path) -> tuple[object, ...]:
    return ("--model", random_llama, "--calibration", words_file, "--eval", words_file, *SIZES)


@pytest.fixture(scope="module")
def measured(arguments: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two tables. Not to be changed."""
    out = tmp_path_factory.mktemp("reproduced")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["reproduce", "table2b", "figure3", *map(str, arguments), "--out", str(out)]
        )
        assert reproduce_main() == 0
    return out


@pytest.fixture
def copied(measured: Path, tmp_path: Path) -> Path:
    return shutil.copytree(measured, tmp_path / "out")


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "reproduce.json").read_text())["results"]


def count_measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measure nothing; return the methods that would be."""
    asked: list[str] = []

    def note(self: Cells, cell: cells.Cell) -> dict[str, Any]:
        asked.append(cell.method)
        return {"texts": {}}

    monkeypatch.setattr(Cells, "_quality", note)
    return asked


def test_a_cell_is_what_quantize_and_evaluate_measure(
    measured: Path,
    random_llama: Path,
    words_file: Path,
    tmp_path: Path,
    run_main: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, window = tmp_path / "ternary", ("--seqlen", "24")
    text = ("--calibration", words_file, "--eval", "none")
    quantize = ("--recipe", "paper", "--reorder", "hessian", "--nsamples", "8", *window)
    assert run_main(quantize_main, random_llama, "--out", out, *text, *quantize) == 0
    capsys.readouterr()
    evaluate = ("--data", words_file, *window, "--windows", "3", "--original", random_llama, "--json")
    assert run_main(evaluate_main, out, *evaluate) == 0
    found = json.loads(capsys.readouterr().out)
    (cell,) = [row for row in results(measured)["table2b"]["rows"] if row["method"] == "hessian"]
    (text_figures,) = cell["texts"].values()
    assert text_figures["perplexity"] == found["value"]
    assert text_figures["mean"] == found["divergence"]["mean"] > 0
    # Figures of methods differ, so no row can hold those of another.
    rows = results(measured)["table2b"]["rows"]
    assert len({next(iter(row["texts"].values()))["mean"] for row in rows}) == 4


# Tables and labels of rows, and settings that set them apart from the paper's: 8 windows, blocks of 128, ITF,
# exact AGA and SSR.
ROWS = {
    ("table1", "round to nearest, 2 bits"): {"method": "rtn-2bit"},
    ("table1", "GPTQ, 2 bits, as its paper has it"): {"method": "gptq-2bit"},
    ("table1", "GPTQ, 2 bits, activation order and clipped grid"): {"method": "gptq-2bit-best"},
    ("table1", "PT²-LLM"): {},
    ("table2a", "no ITF, no AGA"): {"itf": False, "aga": "none"},
    ("table2a", "ITF, no AGA"): {"aga": "none"},
    ("table2a", "AGA, no ITF"): {"itf": False},
    ("table2a", "ITF + AGA by Eq. 13 as printed"): {"aga": "printed"},
    ("table2a", "ITF + AGA, symmetric initialization (Eq. 1-3)"): {"start": "twn"},
    ("table2b", "columns in their order"): {"reorder": "none"},
    ("table2b", "columns in random order"): {"reorder": "random"},
    ("table2b", "columns by the Hessian's diagonal"): {"reorder": "hessian"},
    ("table2b", "columns by SSR"): {},
    ("table2c", "4 windows"): {"nsamples": 4},
    ("table2c", "16 windows"): {"nsamples": 16},
    ("table2d", "words.txt"): {},
    ("table2d", "others.txt"): {"calibration": "others.txt"},
    ("table3", "PT²-LLM, blocks of 64"): {"block_size": 64},
    ("table3", "PT²-LLM, blocks of 256"): {"block_size": 256},
}


def test_every_row_is_quantized_by_the_settings_that_its_label_says(
    tmp_path: Path,
    arguments: tuple[object, ...],
    words_file: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def quantize(options: Options, **rest: Any) -> dict[str, Any]:
        found = {
            **asdict(options),
            **asdict(options.config),
            "calibration": Path(options.calibration or "").name,
        }
        raise FitError(json.dumps({name: found[name] for name in plain}))

    plain = {"method": "pt2-llm", "itf": True, "aga": "exact", "start": "asymmetric", "reorder": "ssr"}
    plain |= {
        "block_size": 128,
        "nsamples": 8,
        "calibration": "words.txt",
        "damping": 0.01,
        "targets": "weights",
    }
    monkeypatch.setattr("harness.comparison.measure.quantize", quantize)
    others = tmp_path / "others.txt"
    others.write_text(tiny.words(400, seed=1))
    texts = ("--calibration", words_file, others)
    names = ("table1", "table2a", "table2b", "table2c", "table2d", "table3")
    assert run_main(reproduce_main, *names, *arguments, *texts, "--out", tmp_path / "out") == 0
    rows = {(n, row["label"]): row for n, table in results(tmp_path / "out").items() for row in table["rows"]}
    for place, own in ROWS.items():
        assert json.loads(rows[place]["error"]) == {**plain, **own}, place


def test_a_repeated_command_measures_nothing_and_tables_share_cells(
    copied: Path, arguments: tuple[object, ...], run_main: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copied / "reproduce.json").read_bytes()
    asked = count_measured(monkeypatch)
    assert run_main(reproduce_main, "table2b", "figure3", *arguments, "--out", copied) == 0
    assert asked == []
    again = json.loads((copied / "reproduce.json").read_text())
    assert again["results"] == json.loads(before)["results"]
    assert run_main(reproduce_main, "table2a", *arguments, "--out", copied) == 0
    # PT²-LLM, the last row of both tables, is there.
    assert asked == ["ssr-init-only", "ssr-itf-only", "ssr-aga-only", "eq13", "symmetric-start"]


def test_a_killed_command_loses_one_cell(
    tmp_path: Path, arguments: tuple[object, ...], run_main: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def quality(self: Cells, cell: cells.Cell) -> dict[str, Any]:
        asked.append(cell.method)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"texts": {"words": {"perplexity": 5.0, "mean": 0.5}}, "bits_per_weight": 2.0}

    monkeypatch.setattr(Cells, "_quality", quality)
    command = ("table2b", *arguments, "--out", tmp_path / "out")
    assert run_main(reproduce_main, *command) == EXIT_INTERRUPTED
    assert not (tmp_path / "out" / "reproduce.json").exists()
    assert run_main(reproduce_main, *command) == 0
    assert asked == ["no-order", "random", "hessian", "hessian", "pt2-llm"]


def test_a_table_is_written_as_soon_as_it_is_complete(
    copied: Path, arguments: tuple[object, ...], run_main: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Cells, cell: cells.Cell) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Cells, "_quality", interrupt)
    for file in copied.glob("*.*"):
        file.unlink()
    command = ("table2b", "table2a", *arguments, "--out", copied)
    assert run_main(reproduce_main, *command) == EXIT_INTERRUPTED
    assert results(copied).keys() == {"table2b"}
    assert {file.name for file in copied.glob("*.*")} >= {"table2b.csv", "table2b.svg", "reproduce.md"}


def test_accuracies_stand_in_the_table_by_the_papers_metric(
    tmp_path: Path, arguments: tuple[object, ...], run_main: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for lm-eval, which tests of harness.zeroshot run where it is installed."""
    asked: list[tuple[str, dict[str, int], int]] = []

    def measure_tasks(model: Any, tasks: dict[str, int], limit: int, compute: Any, batch: int) -> Any:
        asked.append((model.name, tasks, limit))
        piqa = {"paper_metric": "acc", "acc": {"value": 0.25}, "acc_norm": {"value": 0.75}}
        found = {"average": {"value": 0.25}, "piqa": piqa, "shortened": 0, "protocol": "none"}
        return SimpleNamespace(to_json=lambda: found)

    stand_in = SimpleNamespace(measure_tasks=measure_tasks)
    monkeypatch.setitem(sys.modules, "harness.zeroshot.measure", stand_in)
    monkeypatch.setattr("harness.zeroshot.tasks.load_tasks", lambda names, *rest: dict.fromkeys(names, 1))
    real = Cells._quality

    def quality(self: Cells, cell: cells.Cell) -> dict[str, Any]:
        return real(self, cell) if cell.method == "random" else {"texts": {}, "bits_per_weight": 2.0}

    monkeypatch.setattr(Cells, "_quality", quality)
    tasks = ("--tasks", "piqa", "--limit", "5")
    assert run_main(reproduce_main, "table2b", *arguments, *tasks, "--out", tmp_path) == 0
    ((_, loaded, limit),) = asked
    assert (loaded, limit) == ({"piqa": 1}, 5)
    with (tmp_path / "table2b.csv").open(encoding="utf-8") as file:
        _, row, *_ = csv.DictReader(file)
    assert (row["piqa, %"], row["average, %"]) == ("25.0", "25.0")


@pytest.mark.parametrize("change", ["sizes", "text", "model", "limit"])
def test_a_cell_of_other_settings_is_measured_again(
    change: str,
    copied: Path,
    arguments: tuple[object, ...],
    random_llama: Path,
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = count_measured(monkeypatch)
    text, model, more = tmp_path / "words.txt", tmp_path / "Llama-2-7b-hf", ()
    text.write_text(tiny.words(400, seed=0 if change != "text" else 1))
    shutil.copytree(random_llama, model)
    if change == "model":
        tiny.save(tiny.make_model("llama"), model)
    more = {"sizes": ("--samples", "9"), "limit": ("--eval-windows", "2")}.get(change, ())
    words = ("--model", model, "--calibration", text, "--eval", text, *SIZES, *more)
    assert run_main(reproduce_main, "table2b", *words, "--out", copied) == 0
    assert asked == ["no-order", "random", "hessian", "pt2-llm"]


def test_a_moved_model_and_text_are_the_same(
    copied: Path,
    random_llama: Path,
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = count_measured(monkeypatch)
    text = tmp_path / "moved.txt"
    text.write_text(tiny.words(400))
    model = shutil.copytree(random_llama, tmp_path / "moved")
    words = ("--model", model, "--calibration", text, "--eval", text, *SIZES)
    assert run_main(reproduce_main, "table2b", *words, "--out", copied) == 0
    assert asked == []


def test_a_damaged_cell_is_refused_by_name(
    copied: Path, arguments: tuple[object, ...], run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next((copied / "cells").glob("hessian-*.json"))
    file.write_text(file.read_text().replace("hessian", "random"))
    assert run_main(reproduce_main, "table2b", *arguments, "--out", copied) == EXIT_USAGE
    assert f"{file} is damaged; delete it to measure the cell again" in capsys.readouterr().err


def test_a_method_that_diverges_is_a_result(
    tmp_path: Path, arguments: tuple[object, ...], run_main: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quality(self: Cells, cell: cells.Cell) -> dict[str, Any]:
        if cell.method == "random":
            raise FitError("layer 0: beyond what float16 holds")
        return {"texts": {"words": {"perplexity": float("inf"), "mean": 0.5}}, "bits_per_weight": 2.0}

    monkeypatch.setattr(Cells, "_quality", quality)
    assert run_main(reproduce_main, "table2b", *arguments, "--out", tmp_path) == 0
    text = (tmp_path / "reproduce.md").read_text()
    assert "| columns in random order | | | |" in text
    assert "columns in random order failed: layer 0: beyond what float16 holds." in text
    assert "| columns in their order | 2 | inf | 0.500 |" in text


def test_the_papers_values_stand_beside_those_of_its_models(measured: Path) -> None:
    table = results(measured)["table2b"]
    assert [row["paper"]["wikitext2"] for row in table["rows"]] == [13.06, 12.84, 12.35, 11.56]
    with (measured / "table2b.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["paper: average"]) for row in rows] == [41.37, 40.86, 39.15, 43.33]
    for row, of_csv in zip(table["rows"], rows, strict=True):
        (text,) = row["texts"]
        assert float(of_csv[f"{text}: perplexity"]) == row["texts"][text]["perplexity"]
    assert "| columns by SSR | 1.96 |" in (measured / "reproduce.md").read_text()


def test_results_hold_no_folder_of_this_machine(measured: Path, random_llama: Path, words_file: Path) -> None:
    for file in [*measured.glob("reproduce.*"), *measured.glob("*.csv"), *measured.glob("cells/*")]:
        text = file.read_text(encoding="utf-8")
        assert str(random_llama.parent) not in text
        assert str(words_file.parent) not in text


def test_two_commands_do_not_share_a_folder_at_once(
    copied: Path, arguments: tuple[object, ...], run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    from harness.models.folder import locked

    with locked(copied):
        assert run_main(reproduce_main, "table2b", *arguments, "--out", copied) == EXIT_USAGE
    assert "another run is writing to" in capsys.readouterr().err


def test_figure_4_is_measured_of_the_model_and_of_ternary_layers(
    tmp_path: Path, arguments: tuple[object, ...], run_main: Run
) -> None:
    lengths = ("--prefill", "4", "--decode", "3")
    assert run_main(reproduce_main, "figure4", *arguments, *lengths, "--out", tmp_path) == 0
    original, paper, best = results(tmp_path)["figure4"]["rows"]
    for row in (original, paper, best):
        assert all(row[stage] > 0 for stage in ("prefill", "decode", "both"))
    assert paper["bytes"] < original["bytes"] / 3
    assert best["bytes"] < original["bytes"] / 3
    assert b"svg" in (tmp_path / "figure4.svg").read_bytes()
