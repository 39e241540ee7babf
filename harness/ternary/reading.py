"""Read a ternary checkpoint, and refuse one that is damaged, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from harness.errors import UserError
from harness.models.folder import INDEX, SINGLE, read_index
from harness.models.original import quiet_transformers
from harness.ternary.format import PACKED, require_base3
from harness.ternary.linear import TernaryLinear
from reference.types import CODE_LIMIT


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
