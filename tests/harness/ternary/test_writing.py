"""Writing a checkpoint: staged, locked, whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness.backends import load_backend
from harness.errors import UserError
from harness.files import write_json
from harness.models.folder import STAGING, require_free, require_space
from harness.ternary.format import is_ternary
from harness.ternary.writing import CheckpointWriter

REFERENCE = load_backend("reference")


def test_nothing_is_left_of_a_checkpoint_that_was_not_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        CheckpointWriter(out, 2, REFERENCE) as writer,
    ):
        writer.add({"a": torch.zeros(3)})
        assert not is_ternary(writer.folder)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_files_are_staged_on_the_disk_they_stay_on(tmp_path: Path) -> None:
    """A folder beside a mount point is on another disk, and a rename from there fails."""
    with CheckpointWriter(tmp_path / "out", 2, REFERENCE) as writer:
        assert writer.folder.parent == tmp_path / "out"


def test_a_second_run_does_not_write_where_one_is_writing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with CheckpointWriter(out, 2, REFERENCE) as writer:
        writer.add({"a": torch.zeros(3)})
        with pytest.raises(UserError, match=r"another run is writing to .*out; wait"):
            require_free(out, force=True)
        with (
            pytest.raises(UserError, match="another run is writing to"),
            CheckpointWriter(out, 2, REFERENCE),
        ):
            pass
        assert len(list(writer.folder.iterdir())) == 1
    with CheckpointWriter(out, 2, REFERENCE):
        pass


def test_a_failed_run_deletes_only_what_is_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(out, 2, REFERENCE):  # noqa: PT012
        (out / "mine.txt").write_text("mine")
        raise KeyboardInterrupt
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


def test_others_may_read_the_weights(quantized: Path) -> None:
    for file in quantized.glob("*.safetensors"):
        assert file.stat().st_mode & 0o044 == 0o044, file.name


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file exists and is not a folder"):
        require_free(tmp_path / "file" / "out", force=False)


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    left = tmp_path / "out" / STAGING
    left.mkdir(parents=True)
    require_free(tmp_path / "out", force=False)
    (left / "model-00001-of-00009.safetensors").write_bytes(b"old")
    with CheckpointWriter(tmp_path / "out", 2, REFERENCE) as writer:
        assert list(writer.folder.iterdir()) == []


def test_a_full_disk_is_said_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("harness.ternary.writing.save_file", full)
    with (
        pytest.raises(UserError, match=r"model-00001-of-00002.*No space left on device"),
        CheckpointWriter(tmp_path / "out", 2, REFERENCE) as writer,
    ):
        writer.add({"a": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_refused_before_the_start(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(UserError, match=r"needs [\d.]+ MB of disk space"):
        require_space(tmp_path, 1 << 62)


def test_the_tokenizer_needs_space_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=40_000_000))
    with pytest.raises(UserError, match=r"needs [\d.]+ MB of disk space, 40\.0 MB are free"):
        require_space(tmp_path, 35_000_000)


def test_json_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.json"
    write_json(file, {"a": 1})

    def killed(self: Path, *args: object, **kwargs: object) -> None:
        self.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(file, {"a": 2})
    assert json.loads(file.read_bytes()) == {"a": 1}
