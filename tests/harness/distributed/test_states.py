"""Hidden states that are kept on disk, for a run that begins where another one ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from harness.calibration.methods import FitError
from harness.cli import EXIT_USAGE
from harness.distributed.ranks import Ranks
from harness.quantize import run, states
from harness.quantize.__main__ import main as quantize_main
from harness.quantize.__main__ import parser
from harness.quantize.options import from_arguments
from harness.quantize.run import quantize
from tests.harness import tiny
from tests.harness.conftest import SMALL
from tests.harness.distributed.processes import in_processes
from tests.harness.quantize.stopping import files_of, stopped_after

Run = Callable[..., int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.make_model("qwen3", ternary=False), tmp_path_factory.mktemp("model"))


@pytest.fixture
def command(model: Path, words_file: Path, tmp_path: Path) -> list[object]:
    rest = ("--recipe", "best", "--backend", "cpu", "--eval", "none", "--keep-states", tmp_path / "states")
    return [model, "--out", tmp_path / "out", "--calibration", words_file, *SMALL, *rest]


@pytest.fixture(scope="module")
def whole(model: Path, words_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    arguments = [model, "--out", out, "--calibration", words_file, *SMALL]
    arguments += ["--recipe", "best", "--backend", "cpu", "--eval", "none"]
    quantize(from_arguments(parser().parse_args(list(map(str, arguments)))), say=lambda line: None)
    return files_of(out)


def refuse(*arguments: object) -> None:
    raise AssertionError("finished layers run again")


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_finished_layers_do_not_run_again(
    layers: int,
    command: list[object],
    whole: dict[str, bytes],
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped_after(layers, run_main, *command)
    monkeypatch.setattr(run, "run_again", refuse)
    assert run_main(quantize_main, *command, "--resume") == 0
    assert files_of(tmp_path / "out") == whole
    assert not (tmp_path / "states").exists()


def test_another_number_of_processes_begins_there_too(
    command: list[object], whole: dict[str, bytes], tmp_path: Path, run_main: Run
) -> None:
    stopped_after(2, run_main, *command)

    def work(ranks: Ranks) -> None:
        run.run_again = refuse
        arguments = parser().parse_args([*map(str, command), "--resume"])
        quantize(from_arguments(arguments), say=lambda line: None)

    in_processes(3, work)
    assert files_of(tmp_path / "out") == whole


@pytest.mark.parametrize("damage", ["gone", "cut", "other", "original"])
def test_states_that_are_not_the_noted_ones_are_not_used(
    damage: str,
    command: list[object],
    whole: dict[str, bytes],
    tmp_path: Path,
    run_main: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopped_after(2, run_main, *command)
    (file,) = (tmp_path / "states").glob("out-*/layer-00002/shard-00003.safetensors")
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        tensors = load_file(file)
        tensors["hidden" if damage == "other" else "originals"][0, 0, 3, 5] += 1
        save_file(tensors, file)
    assert run_main(quantize_main, *command, "--resume") == 0
    assert "does not hold the hidden states of layer 2" in capsys.readouterr().out
    assert files_of(tmp_path / "out") == whole


def test_too_little_space_is_said_before_the_first_layer(
    command: list[object],
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(states.KeptStates, "needed", lambda self: 1 << 60)
    assert run_main(quantize_main, *command) == EXIT_USAGE
    error = capsys.readouterr().err
    assert f"hidden states need {(1 << 60) / 1e9:.2f} GB in {tmp_path / 'states'}" in error
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "states").exists()


def test_runs_that_share_a_folder_leave_each_other_s_states_alone(
    command: list[object],
    whole: dict[str, bytes],
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even if their output folders have the same name."""
    out = tmp_path / "out"
    stopped_after(2, run_main, *command)
    own = {*(tmp_path / "states").iterdir()}
    (tmp_path / "other").mkdir()
    stopped_after(1, run_main, *[tmp_path / "other" / "out" if word == out else word for word in command])
    (other,) = {*(tmp_path / "states").iterdir()} - own
    files = {*other.rglob("*")}
    monkeypatch.setattr(run, "run_again", refuse)
    assert run_main(quantize_main, *command, "--resume") == 0
    assert files_of(out) == whole
    assert [*(tmp_path / "states").iterdir()] == [other]
    assert {*other.rglob("*")} == files != set()


def test_a_fit_that_fails_leaves_no_states(
    command: list[object], tmp_path: Path, run_main: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **named: Any) -> Iterator[Any]:
        yield next(layers(*arguments, **named))
        raise FitError("no fit")

    layers = run.fit_layers
    monkeypatch.setattr(run, "fit_layers", failing)
    assert run_main(quantize_main, *command) == EXIT_USAGE
    assert not (tmp_path / "states").exists()
