"""python -m harness.report draws the page of a run again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.cli import EXIT_USAGE
from harness.files import write_json
from harness.models.folder import PAGE, PROGRESS, REPORT, STAGING
from harness.page import page
from harness.quantize.__main__ import main as quantize_main
from harness.report import main as report_main
from tests.harness.conftest import SMALL
from tests.harness.page.reading import read
from tests.harness.page.records import record_of
from tests.harness.quantize.stopping import stopped_after

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]


def test_a_run_writes_its_page_and_it_can_be_drawn_again(
    quantized: Path, tmp_path: Path, run_main: Run, capsys: Capture
) -> None:
    written = (quantized / PAGE).read_bytes()
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copy(quantized / REPORT, folder)
    assert run_main(report_main, folder) == 0
    assert capsys.readouterr().out.strip() == str(folder / PAGE)
    assert (folder / PAGE).read_bytes() == written
    assert run_main(report_main, folder / REPORT, "--out", tmp_path / "other.html") == 0
    assert (tmp_path / "other.html").read_bytes() == written


def test_the_page_of_a_run_shows_its_report(quantized: Path) -> None:
    record = json.loads((quantized / REPORT).read_text())
    found = read((quantized / PAGE).read_text("utf-8"))
    assert record["command"].startswith("python -m harness.quantize ")
    assert record["command"] in found.text
    assert f"{record['perplexity']['after']['value']:.4g}" in found.text
    sizes = {row[0]: row[1] for row in found.tables["sizes"]}
    files = sum(file.stat().st_size for file in quantized.glob("*.safetensors"))
    assert sizes["weight files of the checkpoint"] == f"{files:,}"
    # LLaMA of 3 layers, width 128, inner width 176, 2 of 4 heads' keys; tied embedding of 96 words; bfloat16.
    layer = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 176 * 128 + 2 * 128
    assert sizes["original weights"] == f"{2 * (3 * layer + 96 * 128 + 128):,}"


def test_a_run_that_goes_on_has_a_page_too(
    llama: Path, words_file: Path, tmp_path: Path, run_main: Run
) -> None:
    out = tmp_path / "out"
    stopped_after(1, run_main, llama, "--out", out, "--calibration", words_file, *SMALL)
    assert run_main(report_main, out / STAGING / PROGRESS, "--out", tmp_path / "so-far.html") == 0
    assert "1 layer finished" in read((tmp_path / "so-far.html").read_text("utf-8")).text


def test_a_page_that_cannot_be_drawn_fails_no_run(
    llama: Path,
    words_file: Path,
    tmp_path: Path,
    run_main: Run,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(record: object) -> str:
        raise ArithmeticError("no ink")

    monkeypatch.setattr(page, "page", fail)
    out = tmp_path / "out"
    assert run_main(quantize_main, llama, "--out", out, "--calibration", words_file, *SMALL) == 0
    assert f"{out / PAGE} could not be drawn: no ink" in capsys.readouterr().out
    assert (out / REPORT).is_file()
    assert sorted(file.name for file in out.glob("report*")) == [REPORT]


def test_a_page_of_an_earlier_run_does_not_stay_beside_another_model(
    llama: Path, words_file: Path, tmp_path: Path, run_main: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / PAGE).write_text("earlier")
    monkeypatch.setattr("harness.quantize.run.write_page", lambda record, file: None)
    arguments = (llama, "--out", out, "--force", "--calibration", words_file, *SMALL)
    assert run_main(quantize_main, *arguments) == 0
    assert not (out / PAGE).exists()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "report.json does not exist"),
        ("{", "report.json is damaged: not valid JSON"),
        ("{}", "report.json is not the report of a quantization run, or damaged: there is no 'model'"),
        ('{"layers": 3}', "report.json is not the report of a quantization run, or damaged"),
    ],
)
def test_what_is_no_report_is_refused(
    contents: str | None, message: str, tmp_path: Path, run_main: Run, capsys: Capture
) -> None:
    if contents is not None:
        (tmp_path / REPORT).write_text(contents)
    assert run_main(report_main, tmp_path) == EXIT_USAGE
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / PAGE).exists()


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path, run_main: Run, capsys: Capture) -> None:
    write_json(tmp_path / REPORT, record_of(layers=1))
    target = tmp_path / "missing" / "page.html"
    assert run_main(report_main, tmp_path, "--out", target) == EXIT_USAGE
    assert f"{target} cannot be written: No such file or directory" in capsys.readouterr().err


def test_the_record_of_an_unfinished_run_is_named(
    tmp_path: Path, run_main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = tmp_path / STAGING / PROGRESS
    progress.parent.mkdir()
    progress.write_text("{}")
    assert run_main(report_main, tmp_path) == EXIT_USAGE
    assert f"its run is unfinished, draw {progress}" in capsys.readouterr().err
