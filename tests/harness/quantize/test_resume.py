"""Runs that were stopped, and go on to the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import harness
from harness import perplexity
from harness.calibration.methods import FitError
from harness.calibration.passage import sum_bits
from harness.cli import EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_USAGE
from harness.errors import UserError
from harness.models.folder import CONFIG, PROGRESS, REPORT, STAGING
from harness.quantize import run
from harness.quantize.__main__ import main as quantize_main
from harness.ternary.writing import load_shard
from tests.harness.quantize.stopping import files_of, stop_after, stopped_after

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]

LAYERS = 3
ANYWHERE = ("--true-sequential", "--grid", "int8", "--shift", "none", "--embedding", "int8")


def figures_of(folder: Path) -> dict[str, object]:
    """The report without times and what tells that a run was stopped."""
    report = json.loads((folder / REPORT).read_text())
    for layer in report["layers"]:
        del layer["seconds"]
        for matrix in layer["matrices"]:
            del matrix["seconds"]
    kept = ("layers", "perplexity", "divergence", "mean_relative_output_error", "calibration", "config")
    return {name: report.get(name) for name in kept}


@pytest.mark.parametrize("layers", range(1, LAYERS + 1))
@pytest.mark.parametrize("switches", [(), ANYWHERE, ("--recipe", "best")])
def test_a_run_stopped_after_any_layer_goes_on_to_the_same_bytes(
    layers: int,
    switches: tuple[str, ...],
    command: list[object],
    tmp_path: Path,
    run_main: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopped_after(layers, run_main, *command, *switches)
    out = capsys.readouterr().out
    assert f"{layers} of {LAYERS} layers are kept: add --resume to continue" in out
    with pytest.raises(UserError, match=r"no config\.json"):
        harness.load(tmp_path / "out")

    assert run_main(quantize_main, *command, *switches, "--resume") == 0
    printed = capsys.readouterr().out
    assert printed.count("relative output error 0") == LAYERS - layers
    whole = tmp_path / "whole"
    command[command.index(tmp_path / "out")] = whole
    assert run_main(quantize_main, *command, *switches) == 0
    assert files_of(tmp_path / "out") == files_of(whole)
    assert figures_of(tmp_path / "out") == figures_of(whole)
    assert json.loads((tmp_path / "out" / REPORT).read_text())["resumed_after"] == [layers]
    assert json.loads((whole / REPORT).read_text())["resumed_after"] == []


def test_a_run_may_be_stopped_again_and_read_its_layers_from_disk(
    command: list[object], tmp_path: Path, run_main: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    for layers in (1, 2):
        stopped_after(layers, run_main, *command, "--resume")
    assert run_main(quantize_main, *command, "--resume") == 0
    assert json.loads((tmp_path / "out" / REPORT).read_text())["resumed_after"] == [1, 2]
    stopped = files_of(tmp_path / "out")
    assert run_main(quantize_main, *command, "--force") == 0
    assert stopped == files_of(tmp_path / "out")


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_leaves_what_goes_on_and_does_not_load(
    kill: signal.Signals, model: Path, words_file: Path, tmp_path: Path, run_main: Run
) -> None:
    out = tmp_path / "out"
    more = ("--nsamples", "400", "--seqlen", "24", "--backend", "reference")
    arguments = [model, "--out", out, "--calibration", words_file, *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.quantize", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in this process
        # What a shell starts in the background, as it may these tests, ignores Ctrl-C, like its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (out / STAGING / PROGRESS).exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.005)
    process.send_signal(kill)
    printed, error = process.communicate(timeout=60)
    assert "Traceback" not in error
    if kill != signal.SIGKILL:
        expected = {
            signal.SIGINT: (EXIT_INTERRUPTED, "interrupted"),
            signal.SIGTERM: (EXIT_TERMINATED, "terminated"),
        }
        assert (process.returncode, error.splitlines()[-1]) == expected[kill]
        assert "of 3 layers are kept: add --resume to continue" in printed
    for folder in (out, out / STAGING):
        with pytest.raises(UserError, match=r"no config\.json"):
            harness.load(folder)

    assert run_main(quantize_main, *arguments, "--resume") == 0
    stopped = files_of(out)
    assert run_main(quantize_main, *arguments, "--force") == 0
    assert stopped == files_of(out)


@pytest.mark.parametrize("moves", [0, 1, 3, 6, 8])
def test_a_run_killed_while_its_files_move_goes_on(
    moves: int, command: list[object], tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is as a killed process leaves it: nothing is tidied up."""
    out, moved = tmp_path / "out", []
    replace = os.replace

    def stop(source: Path, target: Path) -> None:
        if Path(target).parent == out:
            if len(moved) == moves:
                shutil.copytree(out, tmp_path / "killed")
                raise KeyboardInterrupt
            moved.append(target)
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", stop)
        assert run_main(quantize_main, *command) == EXIT_INTERRUPTED
    shutil.rmtree(out)
    (tmp_path / "killed").rename(out)
    assert run_main(quantize_main, *command, "--resume") == 0
    resumed = files_of(out)
    assert run_main(quantize_main, *command, "--force") == 0
    assert resumed == files_of(out)
    assert not (out / STAGING).exists()


def test_a_stopped_run_is_not_thrown_away_unasked(
    command: list[object], tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_after(2, run_main, *command)
    before = (tmp_path / "out" / STAGING / PROGRESS).read_bytes()
    assert run_main(quantize_main, *command) == EXIT_USAGE
    assert "continue it with --resume, or start over with --force" in capsys.readouterr().err
    assert (tmp_path / "out" / STAGING / PROGRESS).read_bytes() == before
    assert run_main(quantize_main, *command, "--force") == 0
    assert json.loads((tmp_path / "out" / REPORT).read_text())["resumed_after"] == []


@pytest.mark.parametrize("damage", ["gone", "cut", "lacking", "norm", "progress", "empty progress"])
def test_what_is_damaged_is_not_gone_on_with(
    damage: str, command: list[object], tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_after(2, run_main, *command)
    shard = tmp_path / "out" / STAGING / "model-00001-of-00004.safetensors"
    if damage == "gone":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "lacking":
        tensors = load_shard(shard)
        del tensors["model.layers.0.mlp.up_proj.scale"]
        save_file(tensors, shard)
    elif damage == "norm":
        tensors = load_shard(shard)
        tensors["model.layers.0.input_layernorm.weight"][0] += 1
        save_file(tensors, shard)
    else:
        shard = shard.with_name(PROGRESS)
        shard.write_text("{}" if damage == "empty progress" else "{")
    capsys.readouterr()
    assert run_main(quantize_main, *command, "--resume") == EXIT_USAGE
    error = capsys.readouterr().err.strip()
    assert str(shard) in error
    assert "damaged" in error
    assert "Traceback" not in error


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Let something happen while a run measures the original, which is before it locks its folder."""

    def measure(*arguments: object) -> object:
        act()
        return perplexity.measure_on(*arguments)

    monkeypatch.setattr(run, "measure_on", measure)


def test_what_another_run_has_finished_meanwhile_is_not_overwritten(
    command: list[object], tmp_path: Path, run_main: Run, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    meanwhile(monkeypatch, (out / CONFIG).touch)
    assert run_main(quantize_main, *command) == EXIT_USAGE
    assert "exists and is not empty" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == [CONFIG]


def test_a_run_that_another_has_resumed_meanwhile_is_left_to_it(
    command: list[object], tmp_path: Path, run_main: Run, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    stopped_after(1, run_main, *command)
    progress = tmp_path / "out" / STAGING / PROGRESS
    kept = {file.name: file.read_bytes() for file in progress.parent.iterdir()}
    meanwhile(monkeypatch, progress.unlink)  # as it is once its shards have moved into place
    switches = ("--eval-windows", "1")  # so that the original is measured again
    assert run_main(quantize_main, *command, *switches, "--resume") == EXIT_USAGE
    assert "another run has written to" in capsys.readouterr().err
    assert {file.name for file in progress.parent.iterdir()} == kept.keys() - {PROGRESS}


def test_a_matrix_that_cannot_be_fitted_leaves_nothing(
    command: list[object], tmp_path: Path, run_main: Run
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(2, patch, FitError)
        assert run_main(quantize_main, *command) == EXIT_USAGE
    assert not (tmp_path / "out").exists()


def test_where_nothing_was_stopped_a_run_begins(
    command: list[object], tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(quantize_main, *command, "--resume") == 0
    assert "holds no interrupted run: starting from the first layer" in capsys.readouterr().out
    assert (tmp_path / "out" / CONFIG).is_file()
    assert run_main(quantize_main, *command, "--resume") == EXIT_USAGE
    assert "holds a complete checkpoint: there is nothing to resume" in capsys.readouterr().err


def test_a_baseline_is_not_gone_on_with(
    command: list[object], run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(quantize_main, *command, "--method", "rtn-2bit", "--resume") == EXIT_USAGE
    assert "rtn-2bit cannot be resumed: baselines write no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(("switches", "times"), [((), 1), (("--eval-windows", "1"), 2)])
def test_perplexity_before_is_measured_once(
    switches: tuple[str, ...],
    times: int,
    command: list[object],
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped_after(1, run_main, *command)
    measured = []

    def measure(*arguments: object) -> object:
        measured.append(arguments)
        return perplexity.measure_on(*arguments)

    monkeypatch.setattr(run, "measure_on", measure)
    assert run_main(quantize_main, *command, *switches, "--resume") == 0
    assert len(measured) == times


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_checksum_sees_any_bit(dtype: torch.dtype) -> None:
    hidden = [torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    before = sum_bits(hidden)
    assert sum_bits([states.clone() for states in hidden]) == before
    hidden[2][0, 2, 3] = torch.nextafter(hidden[2][0, 2, 3].float() * 1.01, torch.tensor(9.0)).to(dtype)
    assert sum_bits(hidden) != before
