"""Writing a checkpoint: shard by shard, into a folder that holds a model only once it is whole."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import custom_object_save

from harness.backends import Backend
from harness.checkpoint import CONFIG, GENERATION, QUANT_METHOD, REPORT, packed_tensors
from harness.cli import UserError, json_text
from harness.compute import dtype_name
from harness.models import INDEX, SINGLE, Original, read_json
from reference.packing import FORMAT_VERSION
from reference.types import TernaryConfig, TernaryMatrix

STAGING = ".incomplete"
# In there once a layer is done: what report.json will hold, as far as the run has come.
PROGRESS = "progress.json"
# Names of files of weights, as transformers and this program give them.
WEIGHT_FILES = (SINGLE, "model-[0-9]*-of-[0-9]*.safetensors")
# Room for what comes beside the weights: tokenizer (the largest have 35 MB), index, report, config.
BESIDE_WEIGHTS = 64 << 20

# What transformers reads chat templates from, and writes only for a tokenizer that has some.
TEMPLATES = ("chat_template.jinja", "additional_chat_templates")


class CheckpointWriter:
    """Writes a checkpoint shard by shard, and makes it visible only once it is whole.

    Files are `staged`, in a folder that has no config.json and so does not load. `finish` moves them into
    place; leaving the context without it removes them, unless `note` has said how far the run has come.

    Parameters
    ----------
    out : Path
        Folder of the checkpoint.
    shards : int
        How many there will be.
    backend : Backend
        Whose arrays the matrices are made of; it packs them.
    done : int
        How many of them a run that was stopped has left.

    Raises
    ------
    UserError
        On every method, if a file cannot be written (a full disk, say); on entering, if another run is
        writing there, or a shard that should be there is not.
    """

    def __init__(self, out: Path, shards: int, backend: Backend, done: int = 0) -> None:
        self.out = out
        self.shards = shards
        self.backend = backend
        self.done = done
        self._files: dict[str, str] = {}
        self._bytes = 0
        self._written = 0
        self._unpermuted: list[str] = []

    def __enter__(self) -> CheckpointWriter:
        self._staged = ExitStack()
        self.folder = self._staged.enter_context(staged(self.out, resumed=self.done > 0))
        for number in range(1, self.done + 1):
            shard = self.shard(number)
            tensors = load_shard(shard)
            names = [name.removesuffix(".trits") for name in tensors if name.endswith(".trits")]
            self._unpermuted += [name for name in names if f"{name}.permutation" not in tensors]
            self._count(shard.name, tensors)
        return self

    def shard(self, number: int) -> Path:
        """The file of a shard, the first of which is number 1."""
        file = self.folder / f"model-{number:05d}-of-{self.shards:05d}.safetensors"
        moved = self.out / file.name
        if number <= self.done and not file.exists() and moved.exists():
            os.replace(moved, file)  # the run was stopped while it moved them into place
        return file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._staged.__exit__(kind, error, trace)

    def add(
        self, tensors: dict[str, torch.Tensor], matrices: Mapping[str, TernaryMatrix] | None = None
    ) -> None:
        """Write one shard: tensors as they are, and matrices by the name of their layer, packed."""
        file = self.shard(self._written + 1)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        for name, matrix in (matrices or {}).items():
            packed = packed_tensors(name, matrix, self.backend)
            if f"{name}.permutation" not in packed:
                self._unpermuted.append(name)
            tensors.update(packed)
        try:
            save_file(tensors, file, metadata={"format": "pt"})
            file.chmod(0o644)  # safetensors leaves it to the owner alone
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} could not be written: {_reason(error, self.folder)}") from None
        self._count(file.name, tensors)

    def _count(self, file: str, tensors: dict[str, torch.Tensor]) -> None:
        self._written += 1
        self._files.update(dict.fromkeys(tensors, file))
        self._bytes += sum(t.numel() * t.element_size() for t in tensors.values())

    def note(self, report: dict[str, Any]) -> None:
        """Write down how far the run has come: the shards so far are kept if it is stopped."""
        write_json(self.folder / PROGRESS, report)

    def forget(self) -> None:
        """Let the shards so far not be kept."""
        (self.folder / PROGRESS).unlink(missing_ok=True)

    def finish(
        self,
        original: Original,
        matrices: TernaryConfig,
        modules: list[str],
        coded: list[str],
        report: dict[str, Any],
    ) -> None:
        """Write index, tokenizer, code, report and config, and move all into place, config last."""
        try:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._files.items()))}
            write_json(self.folder / INDEX, index)
            original.tokenizer.save_pretrained(self.folder)
            if getattr(original.model, "generation_config", None) is not None:
                write_json(self.folder / GENERATION, original.model.generation_config.to_dict())
            save_code(original.model, original.model.config, self.folder)
            write_json(self.folder / REPORT, report)
            config = original.model.config.to_dict()
            config["architectures"] = [type(original.model).__name__]
            config["quantization_config"] = {
                "quant_method": QUANT_METHOD,
                "format_version": FORMAT_VERSION,
                "block_size": matrices.block_size,
                "grid": matrices.grid,
                "modules": modules,
                "unpermuted": sorted(self._unpermuted),
                "coded": coded,
                "weight_dtype": dtype_name(original.model.dtype),
            }
            write_json(self.folder / CONFIG, config)
            move_into(self.folder, self.out, stale=(*WEIGHT_FILES, INDEX))
        except Exception as error:  # the tokenizer raises plain Exception where the disk is full
            raise UserError(f"{self.out} could not be written: {_reason(error, self.folder)}") from None


def save_code(model: Any, config: Any, folder: Path) -> None:
    """Write the code that came with a model, if some did and it was trusted."""
    for part in (model, config):
        if getattr(part, "_auto_class", None) is not None:
            custom_object_save(part, folder, config=config)


def load_shard(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a shard that a run which was stopped has left.

    Raises
    ------
    UserError
        If it cannot be read.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is missing or damaged ({error}); begin anew with --force") from None


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
        lock = _locked(out)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}") from None
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
        if made:
            with suppress(OSError):
                out.rmdir()
        os.close(lock)


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


def _locked(folder: Path) -> int:
    """A descriptor that holds the lock of a folder until it is closed, however the process ends.

    Raises
    ------
    UserError
        If another run holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another run is writing to {folder}; wait until it is done, or choose another --out"
        ) from None
    except OSError:
        pass  # a file system without locks
    return descriptor


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
    os.close(_locked(out))
    if (out / STAGING / PROGRESS).is_file():
        if not (force or resume):
            raise UserError(
                f"{out} holds a run that was stopped; --resume goes on with it, --force begins anew"
            )
    elif any(entry.name != STAGING for entry in out.iterdir()) and not force:
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


def write_json(file: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, never half."""
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(json_text(value) + "\n", encoding="utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _reason(error: Exception, folder: Path) -> str:
    what = str(error).strip()
    if not folder.exists():
        return f"{what}: {folder} is gone"
    return f"{what} ({shutil.disk_usage(folder).free / 1e6:.0f} MB free on that disk)"
