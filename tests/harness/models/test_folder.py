"""The lock of a model folder: one run at a time, for as long as its process lives."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from harness.errors import UserError
from harness.models.folder import LOCK, STAGING, require_free, staged

HOLD = """
import sys
from pathlib import Path
from harness.models.folder import staged
with staged(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("theirs")
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(out: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that writes to a folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with another_process(out) as process:
        with pytest.raises(UserError) as refused:
            require_free(out, force=True)
        assert str(refused.value) == (
            f"another run is writing to {out}; wait until it finishes, or choose another --out"
        )
        with pytest.raises(UserError, match="another run is writing to"), staged(out):
            pass
        assert (out / STAGING / "file").read_text() == "theirs"
        process.communicate("")
        assert process.returncode == 0
        assert list(tmp_path.iterdir()) == []
        with staged(out):
            pass


def test_a_killed_process_holds_no_lock_and_leaves_nothing_that_counts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with another_process(out) as process:
        process.kill()
        process.wait()
    assert {file.name for file in out.iterdir()} == {STAGING, LOCK}
    require_free(out, force=False)
    with staged(out) as folder:
        assert list(folder.iterdir()) == []
    assert list(out.iterdir()) == []


def test_the_lock_file_is_there_only_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    with staged(tmp_path):
        assert {file.name for file in tmp_path.iterdir()} == {"model", STAGING, LOCK}
    require_free(tmp_path, force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_stops_no_run(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(error, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    out = tmp_path / "out"
    with staged(out) as folder:
        (folder / "file").touch()
        require_free(out, force=True)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_of_another_user_is_neither_ignored_nor_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOCK).touch()

    def forbidden(lock: FileLock) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", forbidden)
    with (
        pytest.raises(UserError, match=r"incomplete\.lock cannot be locked: Permission denied"),
        staged(tmp_path),
    ):
        pass
    assert (tmp_path / LOCK).exists()


def test_it_runs_where_python_has_no_modules_of_unix(tmp_path: Path) -> None:
    """As on Windows; filelock then has another kind of lock."""
    program = """
import sys
from pathlib import Path
import psutil  # which needs some of them on Unix itself
sys.modules["fcntl"] = sys.modules["resource"] = None
from harness.machine import machine, peak_memory
from harness.models.folder import UserError, require_free, staged
out = Path(sys.argv[1]) / "out"
with staged(out):
    try:
        require_free(out, force=True)
    except UserError as error:
        print(error)
assert not out.exists()
assert peak_memory() == 0 and machine()["cores"] > 0
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout.startswith("another run is writing to")
