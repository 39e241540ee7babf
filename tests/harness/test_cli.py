"""What every command line shares."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

import harness
from harness import streams
from harness.cli import EXIT_USAGE
from harness.export.__main__ import main as export_main
from harness.inspect import main as inspect_main
from harness.quantize.__main__ import main as quantize_main
from harness.verify.__main__ import main as verify_main

Run = Callable[..., int]


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (quantize_main, ["--out", ""]),
        (export_main, ["checkpoint", "--format", "gguf", "--out", ""]),
        (export_main, ["", "--format", "gguf", "--out", "model.gguf"]),
        (inspect_main, [""]),
        (lambda: verify_main(["--golden", ""]), []),
    ],
)
def test_an_empty_path_is_not_the_current_folder(
    main: Callable[[], int],
    arguments: list[str],
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.json").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert run_main(main, *arguments) == EXIT_USAGE
    assert "is empty; is a shell variable unset?" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_no_program_takes_paths_in_another_way() -> None:
    for file in Path(harness.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "type" and isinstance(node.value, ast.Name):
                assert node.value.id != "Path", f"{file}:{node.value.lineno}: use harness.cli.path"


def test_torchrun_is_told_of_programs_that_run_in_one_process(
    run_main: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the first process alone; the others end later, as torchrun ends all with the first that ends."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "error: this program runs in one process; start it without torchrun\n"
    for rank, words in (("1", ""), ("0", message)):
        monkeypatch.setenv("RANK", rank)
        assert run_main(lambda: pytest.fail("ran")) == EXIT_USAGE
        assert capsys.readouterr().err == words
    assert waited == [streams.HEAD_START]
