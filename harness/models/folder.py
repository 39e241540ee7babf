"""A model folder: name its files, read its config, and replace its contents as a whole.

New files are staged in a hidden folder inside the target folder, under a lock. They move into place together,
config.json last, so that a folder never holds half a model.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open

from harness.errors import UserError
from harness.files import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Weights of torch's own format, which transformers reads where there are no safetensors files.
BIN_INDEX, BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
CONFIG, GENERATION, REPORT = "config.json", "generation_config.json", "report.json"
# The report as a page; drawn from REPORT once that is complete.
PAGE = "report.html"

STAGING = ".incomplete"

# Beside the staging folder, not in it: a run must hold the lock before it deletes that folder.
LOCK = ".incomplete.lock"

# What locking gives on file systems that have no locks.
WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}

# In the staging folder once a layer is finished: the report of the run so far.
PROGRESS = "progress.json"
# Names that transformers and this program give to files of weights.
WEIGHT_FILES = (SINGLE, "model-[0-9]*-of-[0-9]*.safetensors")
# Disk space for everything but weights: tokenizer (the largest have 35 MB), index, report, config.
BESIDE_WEIGHTS = 64 << 20

# A file of Git LFS begins with this until it is fetched.
POINTER = b"version https://git-lfs.github.com/spec/"

# transformers reads chat templates from these, and writes them only for a tokenizer that has templates.
TEMPLATES = ("chat_template.jinja", "additional_chat_templates")

# What a processor (of images, video, sound) reads beside the files of the tokenizer.
PROCESSOR_TEMPLATE = "chat_template.json"  # where its template was before TEMPLATES
PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    PROCESSOR_TEMPLATE,
)


def require_no_pointer(file: Path) -> None:
    """Refuse a file that Git LFS has not fetched: a few lines of text stand in its place.

    Raises
    ------
    UserError
        If the file is such a pointer.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(len(POINTER))
    except OSError:
        return  # whoever reads the file says why it cannot be read
    if start == POINTER:
        raise UserError(
            f"{file} is a Git LFS pointer, not the file itself; run git lfs pull in {file.parent}, or "
            "download the file"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a model folder."""
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(f"{folder} is not a model: it has no {CONFIG}")
    require_no_pointer(file)
    return read_json(file)


def files_of_tensors(folder: Path) -> dict[str, str]:
    """Map each tensor to the file that holds it; a single file comes before an index, as in transformers."""
    if not (folder / SINGLE).is_file():
        return read_index(folder)
    with safe_open(folder / SINGLE, framework="pt") as shard:
        return dict.fromkeys(shard.keys(), SINGLE)


def weight_files(folder: Path) -> list[str]:
    """Name the files of weights that transformers reads; it prefers safetensors, and a single file."""
    named = read_config(folder).get("transformers_weights")
    if isinstance(named, str):
        return [named]
    for single, index in ((SINGLE, INDEX), (BIN_SINGLE, BIN_INDEX)):
        if (folder / single).is_file():
            return [single]
        if (folder / index).is_file():
            return sorted(set(read_index(folder, index).values()))
    return []


def read_index(folder: Path, name: str = INDEX) -> dict[str, str]:
    """Read from the index of a sharded model which file holds each tensor.

    Raises
    ------
    UserError
        If there is no index, or it is damaged.
    """
    require_no_pointer(folder / name)
    files: Any = read_json(folder / name).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{folder / name} is damaged: it has no weight_map from tensors to files")
    return files


def unfinished(out: Path) -> dict[str, Any] | None:
    """Read the report of an interrupted run; None if there is no run to resume."""
    file = out / STAGING / PROGRESS
    return read_json(file) if file.is_file() else None


@contextmanager
def staged(out: Path, resumed: bool = False, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Make a staging folder inside `out`, on the same disk, for files that `move_into` puts into place.

    The context holds the lock of `out`, so that two runs never mix their files. On exit it deletes the
    staging folder, and `out` if it created `out` and left it empty; after a failure, a staging folder with
    `PROGRESS` is kept. With `resumed`, the contents of an existing staging folder are kept on entry. `check`
    is called once the lock is held, and refuses what another run may have written before.

    Raises
    ------
    UserError
        If the folder cannot be created, or another run is writing to it.
    """
    folder, made = out / STAGING, not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be created: {error.strerror}") from None
    try:
        with locked(out):
            check()
            kept = resumed
            try:
                if not resumed:
                    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
                try:
                    folder.mkdir(exist_ok=resumed)
                except OSError as error:
                    raise UserError(f"{folder} cannot be created: {error.strerror}") from None
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
    """Move the files of `folder` to `out`, replacing an earlier model there; config.json moves last.

    Files of the earlier model that match the patterns in `stale`, its chat templates and its processor, are
    deleted.
    """
    # Without config.json the folder no longer holds a model while files are replaced.
    (out / CONFIG).unlink(missing_ok=True)
    for left in [file for pattern in stale for file in out.glob(pattern)]:
        left.unlink()
    arrived = sorted((f for f in folder.iterdir() if f.name != PROGRESS), key=lambda f: f.name == CONFIG)
    for name in {*TEMPLATES, *(file.name for file in arrived)}:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    for name in (*TEMPLATES, *PROCESSOR):
        (out / name).unlink(missing_ok=True)
    for file in arrived:
        os.replace(file, out / file.name)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; the system releases it when the process ends, however it ends.

    A file system without locks gives no protection. The lock file is deleted on exit; a file left behind by
    a killed process blocks nobody.

    Raises
    ------
    UserError
        If another run holds it.
    """
    file = folder / LOCK
    # A soft lock is only a file, so it would outlive its process. Every user who may write to the folder must
    # be able to open a lock file left behind.
    lock = FileLock(file, timeout=0, mode=0o666, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another run is writing to {folder}; wait until it finishes, or choose another --out"
        ) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise UserError(
                f"{file} cannot be locked: {error.strerror}; delete it if no run is writing to {folder}, "
                "or choose another --out"
            ) from None
    try:
        yield
    finally:
        # Delete before releasing, or another run could lock a file about to be deleted. Windows cannot delete
        # an open file; there filelock deletes it on release.
        with suppress(OSError):
            file.unlink()
        lock.release()


def require_free(out: Path, force: bool, resume: bool = False) -> None:
    """Refuse an output folder that is not empty, unless it may be overwritten or its run resumed.

    Also refuse a folder that another run is writing to; `staged` finds that again, when it takes the lock.
    """
    existing = next(p for p in [out, *out.absolute().parents] if p.exists() or p.is_symlink())
    if not existing.is_dir():
        raise UserError(f"{existing} exists and is not a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{existing} is not writable")
    if not out.is_dir():
        return
    if (out / LOCK).exists():
        with locked(out):
            pass
    require_vacant(out, force, resume)


def require_vacant(out: Path, force: bool, resume: bool = False) -> None:
    """Refuse an existing folder that is not empty, unless it may be overwritten or its run resumed."""
    if (out / STAGING / PROGRESS).is_file():
        if not (force or resume):
            raise UserError(
                f"{out} holds an interrupted run; continue it with --resume, or start over with --force"
            )
    elif any(entry.name not in (STAGING, LOCK) for entry in out.iterdir()) and not force:
        raise UserError(
            f"{out} exists and is not empty; choose another --out, or pass --force to overwrite it"
        )


def require_space(out: Path, weights: int) -> None:
    """Refuse to start if a checkpoint with this many bytes of weights does not fit on the disk."""
    needed = weights + BESIDE_WEIGHTS
    existing = next(p for p in [out, *out.absolute().parents] if p.exists())
    # Shards of an interrupted run become part of the checkpoint, or are deleted first.
    left = sum(file.stat().st_size for file in (out / STAGING).glob("*.safetensors"))
    free = shutil.disk_usage(existing).free + left
    if free < needed:
        raise UserError(
            f"{out} needs {needed / 1e6:.1f} MB of disk space, {free / 1e6:.1f} MB are free; "
            "free some, or choose another --out"
        )


def reason_of_failure(error: Exception, folder: Path) -> str:
    what = str(error).strip()
    if not folder.exists():
        return f"{what}: {folder} is gone"
    return f"{what} ({shutil.disk_usage(folder).free / 1e6:.0f} MB free on that disk)"
