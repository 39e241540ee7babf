"""A ternary model on disk: a Hugging Face folder whose linear layers are packed trits.

What is stored for a linear layer is written down in `reference.packing`. Beside that, config.json has
a ``quantization_config`` with ``quant_method`` "pt2_llm", ``format_version``, ``block_size``, ``grid``
(what alpha and mu are stored in), ``modules``, the names of the packed layers, and ``unpermuted``, those
of them that have no permutation because it is the identity (so that one that got lost is missed),
``coded``, embedding and head if they are stored as `harness.embedding` describes, and ``weight_dtype``,
what weights are rounded to because calibration saw them so (that of config.json if it is not there);
everything else is as transformers writes it.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.dynamic_module_utils import custom_object_save

from harness.backends import Backend
from harness.cli import UserError, json_text
from harness.linear import PACKED, TernaryLinear, permutation_dtype, require_base3, stored_parts
from harness.models import Original, quiet_transformers, read_config, read_json
from reference.packing import FORMAT_VERSION
from reference.types import CODE_LIMIT, GRIDS, CodedGrid, TernaryConfig, TernaryMatrix

QUANT_METHOD = "pt2_llm"
CONFIG, GENERATION, REPORT = "config.json", "generation_config.json", "report.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
STAGING = ".incomplete"
# Names of files of weights, as transformers and this program give them.
WEIGHT_FILES = (SINGLE, "model-[0-9]*-of-[0-9]*.safetensors")
# Room for what comes beside the weights: tokenizer (the largest have 35 MB), index, report, config.
BESIDE_WEIGHTS = 64 << 20

# What transformers reads chat templates from, and writes only for a tokenizer that has some.
TEMPLATES = ("chat_template.jinja", "additional_chat_templates")


def packed_tensors(name: str, matrix: TernaryMatrix, backend: Backend) -> dict[str, torch.Tensor]:
    """The tensors that hold one matrix of a backend's arrays, by their names in the checkpoint."""
    columns = matrix.trits.shape[1]
    packed = backend.function("packing.pack_base3")(matrix.trits)
    parts = {"trits": backend.to_host(packed)}
    for part in ("scale", "shift"):
        grid = backend.to_host(getattr(matrix, part))
        if isinstance(grid, CodedGrid):
            parts |= {part: grid.codes, f"{part}_factor": grid.block[0], "row_factor": grid.row[:, 0]}
        else:
            parts[part] = grid
    permutation = backend.to_host(matrix.permutation)
    if not np.array_equal(permutation, np.arange(columns)):
        parts["permutation"] = permutation.astype(permutation_dtype(columns))
    return {f"{name}.{part}": torch.from_numpy(np.ascontiguousarray(value)) for part, value in parts.items()}


def packed_bytes(rows: int, columns: int, block_size: int, grid: str, permuted: bool) -> int:
    """Bytes of one packed matrix, the bias left out."""
    parts = stored_parts(rows, columns, block_size, grid, permuted).values()
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in parts)


class CheckpointWriter:
    """Writes a checkpoint shard by shard, and makes it visible only once it is whole.

    Files go to a folder inside `out`, on the disk they will stay on; without a config.json it does
    not load. `finish` moves them into place; leaving the context without it removes them. Meanwhile `out`
    is locked, so that a second run does not mix its layers with these.

    Parameters
    ----------
    out : Path
        Folder of the checkpoint.
    shards : int
        How many times `add` will be called.
    backend : Backend
        Whose arrays the matrices are made of; it packs them.

    Raises
    ------
    UserError
        On every method, if a file cannot be written (a full disk, say); on entering, if another run is
        writing there.
    """

    def __init__(self, out: Path, shards: int, backend: Backend) -> None:
        self.out = out
        self.shards = shards
        self.backend = backend
        self.folder = out / STAGING
        self._files: dict[str, str] = {}
        self._bytes = 0
        self._written = 0
        self._unpermuted: list[str] = []

    def __enter__(self) -> CheckpointWriter:
        self._made = not self.out.exists()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.out)
            shutil.rmtree(self.folder, ignore_errors=True)  # left behind by a run that was killed
            self.folder.mkdir()
        except OSError as error:
            raise UserError(f"{self.folder} cannot be made: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._made and kind is not None:
            with suppress(OSError):  # somebody has put something there
                self.out.rmdir()
        os.close(self._lock)

    def add(
        self, tensors: dict[str, torch.Tensor], matrices: Mapping[str, TernaryMatrix] | None = None
    ) -> None:
        """Write one shard: tensors as they are, and matrices by the name of their layer, packed."""
        self._written += 1
        file = f"model-{self._written:05d}-of-{self.shards:05d}.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        for name, matrix in (matrices or {}).items():
            packed = packed_tensors(name, matrix, self.backend)
            if f"{name}.permutation" not in packed:
                self._unpermuted.append(name)
            tensors.update(packed)
        try:
            save_file(tensors, self.folder / file, metadata={"format": "pt"})
            (self.folder / file).chmod(0o644)  # safetensors leaves it to the owner alone
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.folder / file} could not be written: {_reason(error, self.folder)}"
            ) from None
        self._files.update(dict.fromkeys(tensors, file))
        self._bytes += sum(t.numel() * t.element_size() for t in tensors.values())

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
            for part in (original.model, original.model.config):
                if getattr(part, "_auto_class", None) is not None:  # code that came with the model
                    custom_object_save(part, self.folder, config=original.model.config)
            write_json(self.folder / REPORT, report)
            config = original.model.config.to_dict()
            config["architectures"] = [type(original.model).__name__]
            config["quantization_config"] = {
                "quant_method": QUANT_METHOD,
                "format_version": FORMAT_VERSION,
                "block_size": matrices.block_size,
                "grid": matrices.grid,
                "modules": modules,
                "unpermuted": self._unpermuted,
                "coded": coded,
                "weight_dtype": str(original.model.dtype).removeprefix("torch."),
            }
            write_json(self.folder / CONFIG, config)
            move_into(self.folder, self.out, stale=(*WEIGHT_FILES, INDEX))
        except Exception as error:  # the tokenizer raises plain Exception where the disk is full
            raise UserError(f"{self.out} could not be written: {_reason(error, self.folder)}") from None


def move_into(folder: Path, out: Path, stale: tuple[str, ...] = ()) -> None:
    """Put what is in one folder in the place of an earlier model in another, config.json last.

    `stale` are patterns of files that would be left over of it, beside the templates of its tokenizer.
    """
    # An earlier model stops being one before its first file is replaced.
    (out / CONFIG).unlink(missing_ok=True)
    for left in [file for pattern in stale for file in out.glob(pattern)]:
        left.unlink()
    arrived = sorted(folder.iterdir(), key=lambda f: f.name == CONFIG)
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


def require_free(out: Path, force: bool) -> None:
    """Refuse an output folder that holds something already, unless it may be overwritten.

    Also where another run is writing, which is found again when this one begins to.
    """
    existing = next(p for p in [out, *out.absolute().parents] if p.exists() or p.is_symlink())
    if not existing.is_dir():
        raise UserError(f"{existing} exists and is not a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{existing} may not be written to")
    if out.is_dir():
        os.close(_locked(out))
    if out.is_dir() and any(entry.name != STAGING for entry in out.iterdir()) and not force:
        raise UserError(f"{out} exists and is not empty; choose another --out, or --force to overwrite")


def require_space(out: Path, weights: int) -> None:
    """Refuse to start where a checkpoint with so many bytes of weights will not fit."""
    needed = weights + BESIDE_WEIGHTS
    existing = next(p for p in [out, *out.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
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


def is_ternary(folder: Path) -> bool:
    """Whether a folder says that it holds a checkpoint of this format."""
    if not (folder / CONFIG).is_file():
        return False
    quantization = read_config(folder).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


@dataclass(frozen=True)
class StoredLayers:
    """What the ``quantization_config`` of a checkpoint says."""

    block_size: int
    grid: str
    modules: list[str]
    unpermuted: list[str]
    coded: list[str]


def stored_layers(quantization: dict[str, Any], where: str) -> StoredLayers:
    """The ``quantization_config`` of a checkpoint, checked; `where` is what it was read from.

    Raises
    ------
    UserError
        If its version is another, or an entry is missing or of another kind.
    """
    version = quantization.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{where} has format version {version!r}; this program reads version {FORMAT_VERSION}"
        )
    modules, unpermuted = quantization.get("modules"), quantization.get("unpermuted")
    block_size = quantization.get("block_size")
    coded = quantization.get("coded", [])  # there were none at first
    for names in (modules, unpermuted, coded):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{where}: quantization_config lacks modules, unpermuted or block_size")
    if not isinstance(block_size, int) or block_size < 1:
        raise UserError(f"{where}: quantization_config lacks modules, unpermuted or block_size")
    grid = quantization.get("grid", "float16")  # the only one there was at first
    if grid not in GRIDS:
        raise UserError(f"{where}: the grid {grid!r} of quantization_config is none of {', '.join(GRIDS)}")
    return StoredLayers(block_size, grid, modules or [], unpermuted or [], coded)


def verify(folder: Path, model: nn.Module) -> None:
    """Refuse a checkpoint that is not, tensor by tensor, what a model with `TernaryLinear` layers needs.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    model : nn.Module
        The model, on any device; only its shapes and types are looked at.

    Raises
    ------
    UserError
        If a tensor is missing, left over, of the wrong shape or type, or damaged; names the tensor.
    """
    ternary = {name: layer for name, layer in model.named_modules() if isinstance(layer, TernaryLinear)}
    expected = model.state_dict()
    seen = set()
    for name, tensor in tensors_of(folder):
        module, _, part = name.rpartition(".")
        if module in ternary and part == "weight":
            raise UserError(f"{name} is stored beside its packed form")
        if module in ternary and part == "permutation" and name not in expected:
            raise UserError(f"the tensor {name} is there, though the order is the original")
        if name not in expected:
            raise UserError(f"{folder} has tensors the model does not know: {name}")
        if module in ternary and part in PACKED:
            _require_sound(name, part, tensor, expected[name], ternary[module].in_features)
        elif part == "weight" and f"{module}.row_factor" in expected:
            codes = torch.empty_like(expected[name], dtype=torch.int8)
            _require_sound(name, part, tensor, codes, columns=codes.shape[1])
        else:
            _require_fit(name, tensor, expected[name])
        seen.add(name)
    tied = getattr(model, "all_tied_weights_keys", {})
    for name in expected:
        if name not in seen and name not in tied:
            packed = name.rpartition(".")[0] in ternary
            raise UserError(f"the tensor {name} is missing" if packed else f"{folder} lacks {name}")


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer that was saved with a checkpoint; code that came with it runs only if trusted."""
    transformers = quiet_transformers()

    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{path} has no tokenizer that can be read: {error}") from None


def weight_map(folder: Path) -> dict[str, str]:
    """The file that holds each tensor, after a look at whether all of them are there.

    Raises
    ------
    UserError
        If a file is missing, damaged, or holds other tensors than the index lists.
    """
    if (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        with _opened(folder / SINGLE) as shard:
            return dict.fromkeys(shard.keys(), SINGLE)
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{folder / INDEX} is damaged: it has no weight_map from tensors to files")
    for file in sorted(set(files.values())):
        listed = {name for name, where in files.items() if where == file}
        with _opened(folder / file) as shard:
            stored = set(shard.keys())
        for name in sorted(listed ^ stored):
            what = "lacks the tensor" if name in listed else "holds, unlisted in the index,"
            raise UserError(f"{folder / file} {what} {name}")
    return files


def tensors_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint, by name."""
    files = weight_map(folder)
    for file in sorted(set(files.values())):
        with _opened(folder / file) as shard:
            for name in sorted(shard.keys()):
                yield name, shard.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is missing or damaged: {error}") from None


def _require_fit(name: str, tensor: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse a tensor that is stored as it was but cannot be what the model needs."""
    if tensor.shape != expected.shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}, the model needs {tuple(expected.shape)}")
    if tensor.is_floating_point() != expected.is_floating_point():
        raise UserError(f"{name} is {tensor.dtype}, the model needs {expected.dtype}".replace("torch.", ""))
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise UserError(f"{name} holds a value that is not finite")


def _require_sound(name: str, part: str, tensor: torch.Tensor, expected: torch.Tensor, columns: int) -> None:
    """Refuse a packed tensor of another type or shape, or with a value that it cannot have."""
    if tensor.dtype != expected.dtype or tensor.shape != expected.shape:
        raise UserError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}, "
            f"expected {expected.dtype} {tuple(expected.shape)}".replace("torch.", "")
        )
    if part == "trits":
        try:
            require_base3(tensor, columns)
        except ValueError as error:
            raise UserError(f"{name} is damaged: {error}") from None
    elif part == "permutation":
        if not torch.equal(tensor.long().sort().values, torch.arange(columns)):
            raise UserError(f"{name} does not hold every column once")
    elif not torch.isfinite(tensor).all():
        raise UserError(f"{name} holds a value that is not finite")
    elif not tensor.is_floating_point() and int(tensor.int().abs().max()) > CODE_LIMIT:
        raise UserError(f"{name} holds a code beyond {CODE_LIMIT}")


def _reason(error: Exception, folder: Path) -> str:
    what = str(error).strip()
    if not folder.exists():
        return f"{what}: {folder} is gone"
    return f"{what} ({shutil.disk_usage(folder).free / 1e6:.0f} MB free on that disk)"
