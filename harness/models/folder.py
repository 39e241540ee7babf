"""A model folder: names of its files, reading its config, and replacing it as a whole.

New files are staged in a hidden folder inside the target, which is locked meanwhile; they move into place
together, config.json last, so that a folder never holds half a model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open

from harness.errors import UserError
from harness.files import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a model: it has no config.json")
    return read_json(file)


def files_of_tensors(folder: Path) -> dict[str, str]:
    """The file that holds each tensor."""
    if (folder / INDEX).is_file():
        return read_index(folder)
    with safe_open(folder / SINGLE, framework="pt") as shard:
        return dict.fromkeys(shard.keys(), SINGLE)


def read_index(folder: Path) -> dict[str, str]:
    """The file that holds each tensor, as the index of several files says.

    Raises
    ------
    UserError
        If there is no index, or it is damaged.
    """
    files: Any = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{folder / INDEX} is damaged: it has no weight_map from tensors to files")
    return files


CONFIG, GENERATION, REPORT = "config.json", "generation_config.json", "report.json"

STAGING = ".incomplete"

# Beside the staging folder, not in it: a run may delete that one only once it holds the lock.
LOCK = ".incomplete.lock"

# In there once a layer is done: what report.json will hold, as far as the run has come.
PROGRESS = "progress.json"
# Names of files of weights, as transformers and this program give them.
WEIGHT_FILES = (SINGLE, "model-[0-9]*-of-[0-9]*.safetensors")
# Room for what comes beside the weights: tokenizer (the largest have 35 MB), index, report, config.
BESIDE_WEIGHTS = 64 << 20

# What transformers reads chat templates from, and writes only for a tokenizer that has some.
TEMPLATES = ("chat_template.jinja", "additional_chat_templates")


def unfinished(out: Path) -> dict[str, Any] | None:
    """The report of a run that was stopped, as far as it came; None if there is nothing to go on with."""
    file = out / STAGING / PROGRESS
    return read_json(file) if file.is_file() else None


@contextmanager
def staged(out: Path, resumed: bool = False) -> Iterator[Path]:
    """A folder inside `out`, on the disk that files stay on, for what `move_into` puts into place.

    Meanwhile `out` is locked, so that a second run does not mix its files with these. What is left in the
    folder goes afterwards, and `out` with it if it was made for this and is empty; after a failure a folder
    with `PROGRESS` stays. With `resumed` it is taken as it is.

    Raises
    ------
    UserError
        If it cannot be made, or another run is writing there.
    """
    folder, made = out / STAGING, not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}") from None
    try:
        with locked(out):
            kept = resumed
            try:
                if not resumed:
                    shutil.rmtree(folder, ignore_errors=True)  # left behind by a run that was killed
                try:
                    folder.mkdir(exist_ok=resumed)
                except OSError as error:
                    raise UserError(f"{folder} cannot be made: {error.strerror}") from None
                try:
                    yield folder
                    kept = False
                except BaseException:
                    kept = (folder / PROGRESS).is_file()
                    raise
            finally:
                if not kept:
                    shutil.rmtree(folder, ignore_errors=True)
    finally:
        if made:
            with suppress(OSError):
                out.rmdir()


def move_into(folder: Path, out: Path, stale: tuple[str, ...] = ()) -> None:
    """Put what is in one folder in the place of an earlier model in another, config.json last.

    `stale` are patterns of files that would be left over of it, beside the templates of its tokenizer.
    """
    # An earlier model stops being one before its first file is replaced.
    (out / CONFIG).unlink(missing_ok=True)
    for left in [file for pattern in stale for file in out.glob(pattern)]:
        left.unlink()
    arrived = sorted((f for f in folder.iterdir() if f.name != PROGRESS), key=lambda f: f.name == CONFIG)
    for name in {*TEMPLATES, *(file.name for file in arrived)}:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    for name in TEMPLATES:
        (out / name).unlink(missing_ok=True)
    for file in arrived:
        os.replace(file, out / file.name)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; the system frees it when the process ends, in whatever way.

    Nothing is held on a file system without locks. The lock file is deleted afterwards; one that a killed
    process has left stops nobody.

    Raises
    ------
    UserError
        If another run holds it.
    """
    file = folder / LOCK
    # A soft lock, which is no more than a file, would outlive its process. Every user who may write to the
    # folder must be able to open a lock file that was left.
    lock = FileLock(file, timeout=0, mode=0o666, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another run is writing to {folder}; wait until it is done, or choose another --out"
        ) from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        # While it is held, or another run could lock the file that is about to go. Windows deletes no open
        # file; there filelock does it on release.
        with suppress(OSError):
            file.unlink()
        lock.release()


def require_free(out: Path, force: bool, resume: bool = False) -> None:
    """Refuse an output folder that holds something already, unless it may be overwritten or gone on with.

    Also where another run is writing, which is found again when this one begins to.
    """
    existing = next(p for p in [out, *out.absolute().parents] if p.exists() or p.is_symlink())
    if not existing.is_dir():
        raise UserError(f"{existing} exists and is not a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{existing} may not be written to")
    if not out.is_dir():
        return
    if (out / LOCK).exists():
        with locked(out):
            pass
    if (out / STAGING / PROGRESS).is_file():
        if not (force or resume):
            raise UserError(
                f"{out} holds a run that was stopped; --resume goes on with it, --force begins anew"
            )
    elif any(entry.name not in (STAGING, LOCK) for entry in out.iterdir()) and not force:
        raise UserError(f"{out} exists and is not empty; choose another --out, or --force to overwrite")


def require_space(out: Path, weights: int) -> None:
    """Refuse to start where a checkpoint with so many bytes of weights will not fit."""
    needed = weights + BESIDE_WEIGHTS
    existing = next(p for p in [out, *out.absolute().parents] if p.exists())
    # What a run that was stopped has left is either a part of it or goes before.
    left = sum(file.stat().st_size for file in (out / STAGING).glob("*.safetensors"))
    free = shutil.disk_usage(existing).free + left
    if free < needed:
        raise UserError(
            f"{out} needs {needed / 1e6:.1f} MB of disk, {free / 1e6:.1f} MB are free; "
            "free some or choose another --out"
        )


def reason_of_failure(error: Exception, folder: Path) -> str:
    what = str(error).strip()
    if not folder.exists():
        return f"{what}: {folder} is gone"
    return f"{what} ({shutil.disk_usage(folder).free / 1e6:.0f} MB free on that disk)"
