"""Write a ternary checkpoint shard by shard; it becomes visible only when complete."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import deepcopy
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
    PAGE,
    PROGRESS,
    REPORT,
    WEIGHT_FILES,
    move_into,
    reason_of_failure,
    staged,
)
from harness.models.original import Original
from harness.ternary.embedding import correct_config
from harness.ternary.format import QUANT_METHOD, packed_tensors
from harness.ternary.notice import add_notice
from reference.packing import FORMAT_VERSION
from reference.types import TernaryConfig, TernaryMatrix


class CheckpointWriter:
    """Writes a checkpoint shard by shard, and makes it visible only when complete.

    Files go to a `staged` folder, which cannot be loaded because it has no config.json. `finish` moves them
    into place. Leaving the context without `finish` deletes them, unless `note` saved the run's progress.

    Parameters
    ----------
    out : Path
        Folder of the checkpoint.
    shards : int
        Number of shards of the complete checkpoint.
    backend : Backend
        Backend that computed the matrices; it packs them.
    done : int
        Number of shards that an interrupted run finished.
    check : callable
        Is called once the folder is locked; refuses what another run may have written before.

    Raises
    ------
    UserError
        By every method, if a file cannot be written (for example, if the disk is full); on entering, if
        another run is writing to the folder, or a finished shard is missing.
    """

    def __init__(
        self,
        out: Path,
        shards: int,
        backend: Backend,
        done: int = 0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.out = out
        self.shards = shards
        self.backend = backend
        self.done = done
        self.check = check
        self._files: dict[str, str] = {}
        self._bytes = 0
        self._written = 0
        self._unpermuted: list[str] = []

    def __enter__(self) -> CheckpointWriter:
        self._staged = ExitStack()
        self.folder = self._staged.enter_context(staged(self.out, self.done > 0, self.check))
        for number in range(1, self.done + 1):
            shard = self.shard(number)
            tensors = load_shard(shard)
            names = [name.removesuffix(".trits") for name in tensors if name.endswith(".trits")]
            self._unpermuted += [name for name in names if f"{name}.permutation" not in tensors]
            self._count(shard.name, tensors)
        return self

    def shard(self, number: int) -> Path:
        """Return the file of a shard; numbers start at 1."""
        file = self.folder / f"model-{number:05d}-of-{self.shards:05d}.safetensors"
        moved = self.out / file.name
        if number <= self.done and not file.exists() and moved.exists():
            os.replace(moved, file)  # the run was interrupted while moving files into place
        return file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._staged.__exit__(kind, error, trace)

    def add(
        self, tensors: dict[str, torch.Tensor], matrices: Mapping[str, TernaryMatrix] | None = None
    ) -> None:
        """Write one shard: unchanged tensors, and packed matrices by the name of their layer."""
        file = self.shard(self._written + 1)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        for name, matrix in (matrices or {}).items():
            packed = packed_tensors(name, matrix, self.backend)
            if f"{name}.permutation" not in packed:
                self._unpermuted.append(name)
            tensors.update(packed)
        try:
            save_file(tensors, file, metadata={"format": "pt"})
            file.chmod(0o644)  # safetensors lets only the owner read it
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} could not be written: {reason_of_failure(error, self.folder)}") from None
        self._count(file.name, tensors)

    def _count(self, file: str, tensors: dict[str, torch.Tensor]) -> None:
        self._written += 1
        self._files.update(dict.fromkeys(tensors, file))
        self._bytes += sum(t.numel() * t.element_size() for t in tensors.values())

    def note(self, report: dict[str, Any]) -> None:
        """Save the progress of the run, so that an interruption keeps the shards written so far."""
        write_json(self.folder / PROGRESS, report)

    def forget(self) -> None:
        """Delete the saved progress, so that leaving the context deletes all shards."""
        (self.folder / PROGRESS).unlink(missing_ok=True)

    def finish(
        self,
        original: Original,
        matrices: TernaryConfig,
        *,
        modules: list[str],
        shared_inputs: list[list[str]] | None,
        coded: list[str],
        report: dict[str, Any],
    ) -> None:
        """Write index, tokenizer, processor, code, report and config; move all into place, config last."""
        try:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._files.items()))}
            write_json(self.folder / INDEX, index)
            original.tokenizer.save_pretrained(self.folder)
            for name, content in original.processor.items():
                (self.folder / name).write_bytes(content)
            if getattr(original.model, "generation_config", None) is not None:
                write_json(self.folder / GENERATION, original.model.generation_config.to_dict())
            save_code(original.model, original.model.config, self.folder)
            write_json(self.folder / REPORT, report)
            correct_config(original.model)
            described = deepcopy(original.model.config)
            add_notice(described)
            # Not to_dict: transformers writes infinite numbers in a form of its own.
            config = json.loads(described.to_json_string(use_diff=False))
            config.pop("_name_or_path", None)  # a place on this machine; transformers drops it too
            config["architectures"] = [type(original.model).__name__]
            config["quantization_config"] = {
                "quant_method": QUANT_METHOD,
                "format_version": FORMAT_VERSION,
                "block_size": matrices.block_size,
                "grid": matrices.grid,
                "symmetric": matrices.symmetric,
                "modules": modules,
                **({} if shared_inputs is None else {"shared_inputs": shared_inputs}),
                "unpermuted": sorted(self._unpermuted),
                "coded": coded,
                "weight_dtype": dtype_name(original.model.dtype),
            }
            write_json(self.folder / CONFIG, config)
            move_into(self.folder, self.out, stale=(*WEIGHT_FILES, INDEX, PAGE))
        except Exception as error:  # the tokenizer raises plain Exception if the disk is full
            raise UserError(
                f"{self.out} could not be written: {reason_of_failure(error, self.folder)}"
            ) from None


def save_code(model: Any, config: Any, folder: Path) -> None:
    """Write the custom code of a model, if it has any and was loaded with trust."""
    for part in (model, config):
        if getattr(part, "_auto_class", None) is not None:
            custom_object_save(part, folder, config=config)


def load_shard(file: Path) -> dict[str, torch.Tensor]:
    """Load the tensors of a shard that an interrupted run finished.

    Raises
    ------
    UserError
        If the shard cannot be read.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is missing or damaged ({error}); start over with --force") from None
