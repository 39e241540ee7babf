"""Write a ternary checkpoint shard by shard; it becomes visible once it is whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import custom_object_save

from harness.backends import Backend
from harness.compute import dtype_name
from harness.errors import UserError
from harness.files import write_json
from harness.models.folder import (
    CONFIG,
    GENERATION,
    INDEX,
    PROGRESS,
    REPORT,
    WEIGHT_FILES,
    move_into,
    reason_of_failure,
    staged,
)
from harness.models.original import Original
from harness.ternary.format import QUANT_METHOD, packed_tensors
from reference.packing import FORMAT_VERSION
from reference.types import TernaryConfig, TernaryMatrix


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
            raise UserError(f"{file} could not be written: {reason_of_failure(error, self.folder)}") from None
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
        *,
        modules: list[str],
        shared_inputs: list[list[str]],
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
                "shared_inputs": shared_inputs,
                "unpermuted": sorted(self._unpermuted),
                "coded": coded,
                "weight_dtype": dtype_name(original.model.dtype),
            }
            write_json(self.folder / CONFIG, config)
            move_into(self.folder, self.out, stale=(*WEIGHT_FILES, INDEX))
        except Exception as error:  # the tokenizer raises plain Exception where the disk is full
            raise UserError(
                f"{self.out} could not be written: {reason_of_failure(error, self.folder)}"
            ) from None


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
