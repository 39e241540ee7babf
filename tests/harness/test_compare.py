"""Checkpoints side by side, against their files, their reports and another program's figures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import compare, evaluate
from harness.cli import EXIT_USAGE
from harness.models.folder import REPORT

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]

BEFORE = Path(__file__).parent / "ternary" / "before"
INT8, FLOAT16 = BEFORE / "int8-in-order", BEFORE / "float16-ssr"


def report(folder: Path) -> dict:
    return json.loads((folder / REPORT).read_text())


def test_sizes_bits_and_errors_are_those_of_the_files_and_reports(run_main: Run, capsys: Capture) -> None:
    assert run_main(compare.main, INT8, FLOAT16, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    for folder, row in zip((INT8, FLOAT16), found["checkpoints"], strict=True):
        assert row["checkpoint"] == str(folder)
        assert row["bytes_on_disk"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert row["bits_per_weight"] == pytest.approx(report(folder)["bits_per_weight"])
        assert row["layer_errors"] == [layer["relative_output_error"] for layer in report(folder)["layers"]]
    assert found["differing_settings"]["reorder"] == ["none", "ssr"]
    assert "damping" not in found["differing_settings"]


def test_the_table_has_a_column_for_every_checkpoint(run_main: Run, capsys: Capture) -> None:
    assert run_main(compare.main, INT8, FLOAT16) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[: lines[0].index(str(INT8))].strip(): line.split()[-2:] for line in lines}
    assert rows["alpha and mu in"] == ["int8", "float16"]
    assert rows["reorder"] == ["none", "ssr"]
    errors = [[layer["relative_output_error"] for layer in report(f)["layers"]] for f in (INT8, FLOAT16)]
    assert rows["output error of layer 0"] == [f"{error[0]:.5f}" for error in errors]
    means = [sum(error) / len(error) for error in errors]
    assert rows["output error, mean of layers"] == [f"{mean:.5f}" for mean in means]


def test_divergence_is_what_evaluate_finds(
    llama: Path, quantized: Path, words_file: Path, run_main: Run, capsys: Capture
) -> None:
    options = ("--original", llama, "--data", words_file, "--seqlen", 50, "--windows", 3, "--cpu")
    assert run_main(compare.main, quantized, INT8, *options, "--json") == 0
    same, other = json.loads(capsys.readouterr().out)["checkpoints"]
    assert same["divergence"]["mean"] == pytest.approx(0, abs=1e-5)  # weights on the grid: the same model
    assert same["divergence"]["agreement"] == 1
    assert run_main(evaluate.main, INT8, *options, "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    assert other["perplexity"].items() <= measured.items()
    assert other["divergence"].items() <= measured["divergence"].items()
    assert other["divergence"]["mean"] > 0.05
    assert run_main(compare.main, quantized, INT8, *options) == 0
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("KL divergence, mean")
    )
    assert line.split()[-2:] == [f"{row['divergence']['mean']:.4g}" for row in (same, other)]


def test_a_checkpoint_without_a_report_is_compared_all_the_same(
    tmp_path: Path, run_main: Run, capsys: Capture
) -> None:
    bare = shutil.copytree(INT8, tmp_path / "bare")
    (bare / REPORT).unlink()
    assert run_main(compare.main, INT8, bare) == 0
    printed = capsys.readouterr().out
    assert f"{bare} has no report.json: its settings and errors are not known" in printed
    assert f"{report(INT8)['layers'][0]['relative_output_error']:.5f}" in printed


def test_errors_that_do_not_rank_checkpoints_are_said_to_do_so(
    tmp_path: Path, run_main: Run, capsys: Capture
) -> None:
    changed = shutil.copytree(INT8, tmp_path / "changed")
    other = report(INT8)
    other["calibration"]["targets"] = "stream"
    (changed / REPORT).write_text(json.dumps(other))
    assert run_main(compare.main, INT8, changed) == 0
    note = "output errors are of different targets: they do not rank these checkpoints"
    assert note in capsys.readouterr().out.splitlines()
    assert run_main(compare.main, INT8, INT8) == 0
    assert "rank" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("layers", "message"),
    [("[{}]", "report.json is damaged: a layer has no error"), ("3", "is damaged")],
)
def test_a_damaged_report_is_refused_by_name(
    layers: str, message: str, tmp_path: Path, run_main: Run, capsys: Capture
) -> None:
    folder = shutil.copytree(INT8, tmp_path / "damaged")
    (folder / REPORT).write_text(f'{{"layers": {layers}}}')
    assert run_main(compare.main, folder) == EXIT_USAGE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((INT8, "--original", "a"), "pass --original and --data"),
        ((INT8, "--data", "builtin"), "pass --original and --data"),
        ((BEFORE,), "it has no config.json"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    arguments: tuple, message: str, run_main: Run, capsys: Capture
) -> None:
    assert run_main(compare.main, *arguments) == EXIT_USAGE
    assert message in capsys.readouterr().err
