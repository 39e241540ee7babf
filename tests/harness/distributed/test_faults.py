"""One process fails, dies, or is another one than it should be."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.distributed.ranks import Ranks
from harness.errors import UserError
from harness.models.folder import PROGRESS, STAGING
from harness.quantize.options import NO_EVALUATION, RECIPES, Options
from harness.quantize.run import quantize
from tests.harness import tiny
from tests.harness.distributed.processes import end, forked, in_processes
from tests.harness.quantize.stopping import files_of

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.make_model("qwen3", ternary=False), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def options(model: Path, words_file: Path) -> Options:
    best = RECIPES["best"]
    return Options(
        model=str(model),
        backend="cpu",
        calibration=str(words_file),
        evaluation=NO_EVALUATION,
        nsamples=16,
        seqlen=24,
        config=best.config,
        targets=best.targets,
        token_weights=True,
        true_sequential=True,
    )


@pytest.fixture(scope="module")
def whole(options: Options, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(replace(options, out=out), say=lambda line: None)
    return files_of(out)


def work_of(
    options: Options, before: Callable[[Ranks], None] = lambda ranks: None
) -> Callable[[Ranks], None]:
    def work(ranks: Ranks) -> None:
        before(ranks)
        quantize(options, say=lambda line: None)

    return work


def layers_noted(out: Path) -> int:
    file = out / STAGING / PROGRESS
    return len(json.loads(file.read_text())["layers"]) if file.exists() else 0


@pytest.mark.parametrize(("size", "victim", "then"), [(3, 1, 2), (2, 0, 4)])
def test_the_process_that_dies_is_named_and_another_number_goes_on_to_the_same_bytes(
    size: int, victim: int, then: int, options: Options, whole: Any, tmp_path: Path, capfd: Capture
) -> None:
    out = tmp_path / "out"
    with forked(size, work_of(replace(options, out=out))) as processes:
        while not layers_noted(out):
            assert all(process.is_alive() for process in processes)
            time.sleep(0.01)
        killed = processes[victim].pid
        os.kill(killed, signal.SIGKILL)
        assert end(processes, 60) < 60
    errors = capfd.readouterr().err.splitlines()
    said = [line for line in errors if "died: killed, perhaps for its memory" in line]
    assert len(said) == 1
    assert f"rank {victim} on " in said[0]
    assert f"(process {killed})" in said[0]
    assert "repeat the command with --resume" in said[0]
    assert not [line for line in errors if "Traceback" in line]
    in_processes(then, work_of(replace(options, out=out, resume=True)))
    assert files_of(out) == whole


def test_a_full_disk_of_the_first_process_ends_all_with_its_message_and_keeps_layers(
    options: Options, whole: Any, tmp_path: Path, capfd: Capture
) -> None:
    out = tmp_path / "out"

    def fill(ranks: Ranks) -> None:
        from harness.ternary import writing

        save = writing.save_file

        def full(tensors: Any, file: Path, **rest: Any) -> None:
            if "00002-of" in file.name:
                raise OSError(errno.ENOSPC, "No space left on device")
            save(tensors, file, **rest)

        writing.save_file = full

    with forked(2, work_of(replace(options, out=out), fill)) as processes:
        end(processes, 60)
    errors = capfd.readouterr().err
    assert errors.count("error:") == 1
    assert "model-00002-of-00004.safetensors could not be written" in errors
    assert layers_noted(out) == 1
    quantize(replace(options, out=out, resume=True), say=lambda line: None)
    assert files_of(out) == whole


def test_a_failure_of_another_process_is_told_with_its_rank(
    options: Options, tmp_path: Path, capfd: Capture
) -> None:
    def fail(ranks: Ranks) -> None:
        if ranks.rank == 1:
            raise UserError("this model is not here")

    with forked(3, work_of(replace(options, out=tmp_path / "out"), fail)) as processes:
        end(processes, 60)
    lines = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("rank 1 on ")
    assert lines[0].endswith(": error: this model is not here")


def test_an_error_that_all_processes_meet_is_told_once(
    options: Options, tmp_path: Path, capfd: Capture
) -> None:
    (tmp_path / "out").mkdir()
    nowhere = replace(options, model=str(tmp_path / "nowhere"), out=tmp_path / "out")
    with forked(2, work_of(nowhere)) as processes:
        end(processes, 60)
    lines = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


def test_a_process_with_another_model_text_or_library_is_refused_before_the_first_layer(
    options: Options, model: Path, words_file: Path, tmp_path: Path
) -> None:
    other = tiny.make_model("qwen3", ternary=False)
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight[3, 4] += 0.25
    tiny.save(other, tmp_path / "other")
    words = tmp_path / "words.txt"
    words.write_text(words_file.read_text().replace("w5 ", "w6 ", 1))
    own = replace(options, out=tmp_path / "out")

    def work(ranks: Ranks) -> None:
        from harness.quantize import record

        def refused(changed: Options, what: str) -> None:
            mine = changed if ranks.rank == 1 else own
            with pytest.raises(UserError, match=f"rank 1 on .* would compute something else .*: {what}"):
                quantize(mine, say=lambda line: None)

        refused(replace(own, model=str(tmp_path / "other")), "original: model.safetensors")
        refused(replace(own, calibration=str(words)), "calibration.windows_checksum")
        refused(replace(own, config=replace(own.config, damping=0.2)), "config.damping")
        facts = record.environment()
        if ranks.rank == 1:
            facts = {**facts, "versions": {**facts["versions"], "numpy": "1.0"}}
        record.environment = lambda: facts
        refused(own, "versions.numpy")
        assert not (tmp_path / "out").exists()

    in_processes(2, work)
