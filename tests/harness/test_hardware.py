"""The command that runs everything on a device."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import hardware
from harness.benchmark.options import parser
from harness.cli import EXIT_USAGE
from harness.errors import UserError
from harness.verify.__main__ import main as verify_main

Run = Callable[..., int]


def test_a_part_that_fails_does_not_stop_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    fine, broken = (f"python -m {module} --help".split() for module in ("json.tool", "no_such_module"))
    parts = {"one": fine, "two": broken, "three": fine, "four": ["no-such-program"]}
    assert hardware.run_parts(parts) == 1
    lines = capfd.readouterr().out.splitlines()[-4:]
    assert [line.split()[:2] for line in lines] == [
        ["one", "passed"],
        ["two", "FAILED"],
        ["three", "passed"],
        ["four", "not"],
    ]
    assert hardware.run_parts({"one": fine, "four": ["no-such-program"]}) == 0


def test_without_a_device_nothing_is_run(
    run_main: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(name: str) -> None:
        raise UserError(f"backend {name} cannot run here: no CUDA device")

    monkeypatch.setattr(hardware, "load_backend", none)
    monkeypatch.setattr(hardware, "run_parts", lambda parts: pytest.fail("run"))
    assert run_main(hardware.main, "tests") == EXIT_USAGE
    assert "gpu" in capsys.readouterr().err
    assert run_main(hardware.main, "nothing") == EXIT_USAGE
    assert "unknown part 'nothing'; choose from tests, golden" in capsys.readouterr().err


@pytest.mark.parametrize("part", hardware.PARTS)
def test_every_part_is_a_command_that_exists(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = hardware.PARTS[part][1].split()
    program, *arguments = command[command.index("-m") + 1 :]
    if program == "pytest":
        files = [argument.partition("::")[0] for argument in arguments if not argument.startswith("-")]
        assert all(Path(file).exists() for file in files)
    elif program == "harness.benchmark":
        assert getattr(parser().parse_args(arguments), "backend", "gpu") == "gpu"
    else:
        seen = []
        monkeypatch.setattr(
            "harness.verify.__main__.load_backend", lambda *names: seen.append(names) or 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            verify_main(arguments)
        assert seen == [("gpu", None)]


def test_every_test_of_full_size_is_in_one_part() -> None:
    names = re.findall(r"^def (test_\w+)", Path(hardware.FULL_SIZE).read_text(encoding="utf-8"), re.M)
    single = hardware.PARTS["full-size"][1].partition("::")[2]
    keyword = hardware.PARTS["largest"][1].partition("-k")[2]
    assert [single, *(name for name in names if keyword in name)] == names


def test_a_part_whose_model_is_not_installed_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hardware, "EMBEDDED_PACKAGE", "no_such_package")
    assert hardware.run_parts({"model": hardware.command_of("model"), "none": ["python", "-c", ""]}) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^model +not run: no_such_package is not installed$", printed, re.M)
    assert re.search(r"^none +passed in", printed, re.M)


@pytest.mark.parametrize("installed", [True, False])
def test_tests_run_side_by_side_where_they_can(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: object() if installed else None)
    assert ("--numprocesses" in hardware.command_of("tests")) == installed
    assert "--numprocesses" not in hardware.command_of("largest")
