"""Options that would change nothing are refused by the name that was typed, even with their default value.

Those of harness.quantize are in quantize/test_recipes.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness import compare, evaluate
from harness.cli import EXIT_USAGE
from harness.reproduce import __main__ as reproduce

Run = Callable[..., int]
PROGRAMS = {"evaluate": evaluate, "compare": compare, "reproduce": reproduce}
# A command line of each program, and options that it has no use for.
IDLE = {
    "evaluate --data builtin": (
        "without --tasks",
        ["--tasks-dir .", "--limit 3", "--batch-size 8"],
    ),
    "evaluate --tasks piqa": (
        "without --data",
        ["--seqlen 2048", "--seqlen 9", "--windows 4", "--text-column a"],
    ),
    "evaluate some/folder other/folder --data builtin": (
        "without a .gguf file",
        ["--gguf-dtype float16", "--gguf-dtype bfloat16"],
    ),
    "compare folder": (
        "without --original",
        ["--seqlen 2048", "--windows 4", "--bos auto", "--cpu", "--text-column a"],
    ),
    "compare folder --original some/folder --data builtin": (
        "without a .gguf file",
        ["--gguf-dtype float16"],
    ),
    "reproduce table1 figure4": ("without --tasks", ["--tasks-dir .", "--limit 3", "--batch-size 8"]),
    "reproduce table1": (
        "without --peers auto-round",
        ["--peer-iterations 200", "--peer-iterations 5 --peers hqq"],
    ),
    "reproduce table2a figure3": ("without figure4", ["--prefill 128", "--decode 9", "--decode=9"]),
    "reproduce figure4": ("without table1", ["--peers auto-round"]),
    "reproduce all --model some/folder": ("without a .gguf file", ["--gguf-dtype bfloat16"]),
}


@pytest.mark.parametrize(
    ("command", "option", "reason"),
    [(command, option, reason) for command, (reason, options) in IDLE.items() for option in options],
)
def test_an_option_that_would_change_nothing_is_refused(
    command: str,
    option: str,
    reason: str,
    run_main: Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    program, *arguments = f"{command} {option}".split()
    assert run_main(PROGRAMS[program].main, *arguments) == EXIT_USAGE
    name = option.replace("=", " ").split()[0]
    assert f"error: {name} has no effect {reason}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate no/folder model.gguf --data builtin --gguf-dtype float16 --seqlen 9", "no/folder"),
        ("evaluate no/folder --original model.gguf --data builtin --gguf-dtype float16", "model.gguf"),
        ("evaluate --tasks piqa --gguf-dtype float16 --limit 3 --tasks-dir no-folder", "no-folder"),
        ("compare no/folder --original a.gguf --data builtin --gguf-dtype float16 --cpu", "no/folder"),
        ("reproduce all --prefill 9 --gguf-dtype float16 --calibration no.txt --eval no.txt", "no.txt"),
    ],
)
def test_an_option_that_changes_something_is_not(
    command: str,
    message: str,
    run_main: Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The command then fails by what does not exist."""
    monkeypatch.chdir(tmp_path)
    program, *arguments = command.split()
    assert run_main(PROGRAMS[program].main, *arguments) == EXIT_USAGE
    error = capsys.readouterr().err
    assert message in error
    assert "no effect" not in error
