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

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from harness.backends import Backend
from harness.cli import UserError
from harness.linear import PACKED, TernaryLinear, permutation_dtype, require_base3, stored_parts
from harness.models import INDEX, SINGLE, quiet_transformers, read_config, read_index
from reference.packing import FORMAT_VERSION
from reference.types import CODE_LIMIT, GRIDS, CodedGrid, TernaryMatrix

QUANT_METHOD = "pt2_llm"
CONFIG, GENERATION, REPORT = "config.json", "generation_config.json", "report.json"


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
    for entry, names in (("modules", modules), ("unpermuted", unpermuted), ("coded", coded)):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{where}: {entry} of quantization_config is no list of names")
    if not isinstance(block_size, int) or block_size < 1:
        raise UserError(f"{where}: block_size of quantization_config is no number from 1 on")
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
    files = read_index(folder)
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
