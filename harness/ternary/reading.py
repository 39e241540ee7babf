"""Read a ternary checkpoint; check every tensor and name the one that is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from harness.errors import UserError
from harness.models.folder import INDEX, SINGLE, read_index, require_no_pointer
from harness.ternary.format import PACKED, require_base3
from harness.ternary.linear import TernaryLinear
from reference.types import CODE_LIMIT


def verify(files: list[Path], model: nn.Module) -> None:
    """Check that the tensors of a checkpoint are those that a model with `TernaryLinear` layers needs.

    Parameters
    ----------
    files : list of Path
        The shards of the checkpoint, all in one folder.
    model : nn.Module
        The model, on any device; only shapes and dtypes of its tensors are used.

    Raises
    ------
    UserError
        If a tensor is missing, unknown, damaged, or of the wrong shape or dtype; the message names it.
    """
    ternary = {name: layer for name, layer in model.named_modules() if isinstance(layer, TernaryLinear)}
    expected, folder = model.state_dict(), files[0].parent
    buffers = {name for name, _ in model.named_buffers()}
    seen = set()
    for name, tensor in _tensors_in(files):
        module, _, part = name.rpartition(".")
        if module in ternary and part == "weight":
            raise UserError(f"{folder} holds {name} both dense and packed; quantize the model again")
        if module in ternary and part == "permutation" and name not in expected:
            raise UserError(f"{folder} holds {name}, but its config.json says that {module} is not reordered")
        if name not in expected:
            raise UserError(f"{folder} has a tensor that the model does not have: {name}")
        if module in ternary and part in PACKED:
            require_packed(name, part, tensor, expected[name], ternary[module].in_features)
        elif part == "weight" and f"{module}.row_factor" in expected:
            codes = torch.empty_like(expected[name], dtype=torch.int8)
            require_packed(name, part, tensor, codes, columns=codes.shape[1])
        else:
            _require_unquantized(name, tensor, expected[name], bound=name in buffers)
        seen.add(name)
    tied = getattr(model, "all_tied_weights_keys", {})
    for name in expected:
        if name not in seen and name not in tied:
            packed = name.rpartition(".")[0] in ternary
            raise UserError(f"the tensor {name} is missing" if packed else f"{folder} lacks {name}")


def weight_map(folder: Path) -> dict[str, str]:
    """Map every tensor name to its file, and check the files against the index.

    Raises
    ------
    UserError
        If a file is missing or damaged, or its tensors differ from those in the index.
    """
    if (folder / SINGLE).is_file():  # which transformers reads before any shards
        with _opened(folder / SINGLE) as shard:
            return dict.fromkeys(shard.keys(), SINGLE)
    variants = sorted(file.name for file in folder.glob("model.*.safetensors"))
    if variants and not (folder / INDEX).exists():
        raise UserError(
            f"{folder} only holds a variant of a checkpoint, {variants[0]}; read it by from_pretrained(..., "
            "variant=...) and save it without a variant"
        )
    files = read_index(folder)
    for file in sorted(set(files.values())):
        listed = {name for name, where in files.items() if where == file}
        with _opened(folder / file) as shard:
            stored = set(shard.keys())
        for name in sorted(listed ^ stored):
            what = "lacks the tensor" if name in listed else "holds a tensor that the index does not list:"
            raise UserError(f"{folder / file} {what} {name}")
    return files


def tensors_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over the tensors of a checkpoint, with their names."""
    return _tensors_in([folder / file for file in sorted(set(weight_map(folder).values()))])


def _tensors_in(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with _opened(file) as shard:
            for name in sorted(shard.keys()):
                yield name, shard.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    require_no_pointer(file)
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is missing or damaged: {error}") from None


def _require_unquantized(name: str, tensor: torch.Tensor, expected: torch.Tensor, bound: bool) -> None:
    """Refuse an unquantized tensor of the wrong shape or kind of dtype, or with non-finite values.

    A `bound` may be infinite: Gemma 4's audio tower keeps the limits of activations in buffers.
    """
    if tensor.shape != expected.shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}")
    if tensor.is_floating_point() != expected.is_floating_point():
        raise UserError(f"{name} is {tensor.dtype}, expected {expected.dtype}".replace("torch.", ""))
    allowed = ~torch.isnan(tensor) if bound else torch.isfinite(tensor)
    if not allowed.all():
        raise UserError(f"{name} is damaged: it has a value that is not finite")


def require_packed(name: str, part: str, tensor: torch.Tensor, expected: torch.Tensor, columns: int) -> None:
    """Refuse a packed tensor of the wrong dtype or shape, or with invalid values."""
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
            raise UserError(f"{name} is damaged: it does not hold every column exactly once")
    elif not torch.isfinite(tensor).all():
        raise UserError(f"{name} is damaged: it has a value that is not finite")
    elif not tensor.is_floating_point() and int(tensor.int().abs().max()) > CODE_LIMIT:
        raise UserError(f"{name} is damaged: it has a code beyond ±{CODE_LIMIT}")
