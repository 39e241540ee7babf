"""Export a ternary checkpoint to a GGUF file.

Each matrix gets the smallest type of `gguf_types` that holds its trits and its grid. Embedding and head keep
their dtype unless told otherwise. All vectors are float32, as llama.cpp needs them so.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.gguf_writer import TensorInfo
from numpy.typing import NDArray

from harness.errors import UserError
from harness.export.gguf_embedding import round_rows
from harness.export.gguf_types import EMBEDDING, PLAIN, TERNARY, DataType, pack
from harness.export.source import (
    AS_IT_IS,
    Exported,
    Rounding,
    Stored,
    read_exportable,
    require_outside,
)
from harness.export.tensors import TernaryTensor, ternary_tensors
from harness.models.folder import require_free, require_space
from harness.progress import Progress, say_on_stdout
from harness.runtimes.containers import GGUF_TYPES, smallest
from harness.runtimes.features import Refused, refusals_of
from harness.runtimes.gguf_architectures import Architecture
from harness.runtimes.gguf_header import Header, describe, plain_type
from harness.words import counted

_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class _Entry:
    """A tensor to write; `make` computes its data only when it is written."""

    name: str
    kind: DataType
    shape: tuple[int, ...]
    make: Callable[[], NDArray[Any]]

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return int(np.prod(self.shape[:-1])) * self.kind.row_bytes(self.shape[-1])


def export_gguf(
    folder: Path,
    out: Path,
    force: bool = False,
    trust_remote_code: bool = False,
    kind: str | None = None,
    embedding: str = AS_IT_IS,
) -> Exported:
    """Export a checkpoint without reordering to a GGUF file.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    out : Path
        The GGUF file; it appears only when complete. Its folder is created if needed.
    force : bool
        Whether to overwrite an existing file.
    trust_remote_code : bool
        Whether Python code shipped with the model may run.
    kind : str, optional
        Type of all ternary matrices, one of `gguf_types.TERNARY` or "F32"; by default the smallest that
        holds each.
    embedding : str
        Type of embedding and head, one of `gguf_types.EMBEDDING`; by default their own.

    Returns
    -------
    Exported

    Raises
    ------
    UserError
        If the checkpoint is damaged or reordered, if GGUF or llama.cpp does not support a feature of the
        model, if no type holds a matrix, or if the file is inside the checkpoint or cannot be written.

    Notes
    -----
    With d and m as stored, each weight is float32(alpha) * q + float32(m), where
    abs(m - (mu - alpha)) is at most half a unit in the last place of float16, or 0 if mu is 0.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder; pass a file name to --out")
    require_outside(folder, out)
    require_free(out.parent, force=True)
    if out.exists() and not force:
        raise UserError(f"{out} exists; choose another --out, or pass --force to overwrite it")
    stored = read_exportable(folder, trust_remote_code)
    rounding = Rounding()
    with refusals_of(folder):
        header = describe(stored.model, stored.tokenizer, stored.tensors)
        types, lacking = _types(stored, kind)
    writer = header.writer
    # transformers would take the bare name "mistral" for another architecture.
    writer.add_name(f"{folder.resolve().name} PT²-LLM")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_main_type(types).file_type)
    entries = [
        *_plain_entries(stored, header, embedding),
        *_ternary_entries(stored, header, types, rounding),
    ]
    require_space(out, sum(entry.size for entry in entries))

    partial, made = out.with_name(out.name + ".partial"), not out.parent.exists()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write(writer, entries, partial)
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"{out} could not be written: {error.strerror or error}") from None
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
        if made and not out.exists():
            with suppress(OSError):  # the folder was not created, or others put files into it
                out.parent.rmdir()
    ternary = entries[-len(types) :]
    return Exported(
        out,
        out.stat().st_size,
        sum(int(np.prod(entry.shape)) for entry in ternary),
        sum(entry.size for entry in ternary),
        rounding,
        (*_type_lines(types, lacking), *header.notes),
    )


def interleave(rows: Any, heads: int) -> Any:
    """Reorder the rows of q or k as GGUF's llama does: interleave the two halves of each head."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _types(
    stored: Stored, kind: str | None
) -> tuple[dict[TernaryTensor, DataType], dict[str, dict[str, str]]]:
    """Choose the type of each tensor; also say, by type, what smaller ones lack for its first tensor."""
    tensors = ternary_tensors(stored)
    if kind == "F32":
        return dict.fromkeys(tensors, PLAIN["F32"]), {}
    candidates = [held for held in GGUF_TYPES if kind in (None, held.name)]
    types: dict[TernaryTensor, DataType] = {}
    lacking: dict[str, dict[str, str]] = {}
    for tensor in tensors:
        symmetric = all(stored.symmetric(module) for module in tensor.modules)
        matrix = (tensor.shape[-1], stored.layers[tensor.modules[0]].block_size, symmetric)
        held, lacks = smallest(candidates, *matrix)
        if held is None:
            others = [other.name for other in GGUF_TYPES if other.misfit(*matrix) is None]
            name, lack = list(lacks.items())[-1]
            can = f"; {' or '.join(others)} can" if others else ""
            raise Refused(f"GGUF's {name} cannot hold {tensor.name}, as it {lack}{can}")
        types[tensor] = TERNARY[held.name]
        lacking.setdefault(held.name, lacks)
    return types, lacking


def _main_type(types: dict[TernaryTensor, DataType]) -> DataType:
    """The type that holds most weights."""
    weights: Counter[DataType] = Counter()
    for tensor, kind in types.items():
        weights[kind] += int(np.prod(tensor.shape))
    return weights.most_common(1)[0][0]


def _type_lines(types: dict[TernaryTensor, DataType], lacking: dict[str, dict[str, str]]) -> list[str]:
    """Say which types were chosen and why."""
    counts: Counter[DataType] = Counter()
    for tensor, kind in types.items():
        counts[kind] += len(tensor.modules)
    lines = []
    for kind, count in counts.items():
        bits = f"{8 * kind.size / kind.columns:.4g} bits per weight"
        line = f"{kind.name}, {bits}, holds {counted(count, 'matrix')}"
        by_reason: dict[str, list[str]] = {}
        for name, reason in lacking.get(kind.name, {}).items():
            by_reason.setdefault(reason, []).append(name)
        reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
        lines.append(line + (f"; smaller types do not ({reasons})" if reasons else ""))
    return lines


def _ordered(stored: Stored, architecture: Architecture, name: str, rows: Any) -> Any:
    """The rows of a matrix or bias, an array or tensor, in the order of GGUF."""
    heads = {"q_proj": stored.config.num_attention_heads, "k_proj": stored.config.num_key_value_heads}
    count = next((heads[part] for part in name.split(".") if part in heads), None)
    return interleave(rows, count) if count and architecture.interleaved else rows


def _ternary_entries(
    stored: Stored, header: Header, types: dict[TernaryTensor, DataType], rounding: Rounding
) -> list[_Entry]:
    """List the ternary tensors; making one adds its error to `rounding`."""

    def entry(tensor: TernaryTensor, kind: DataType) -> _Entry:
        def make() -> NDArray[Any]:
            packed = [
                _ordered(stored, header.architecture, tensor.name, pack(matrix, kind.name, module, rounding))
                for module, matrix in zip(tensor.modules, tensor.matrices(stored), strict=True)
            ]
            return np.concatenate(packed)

        return _Entry(header.name_of(f"{tensor.name}.weight"), kind, tensor.shape, make)

    return [entry(tensor, kind) for tensor, kind in types.items()]


def _plain_entries(stored: Stored, header: Header, embedding: str) -> list[_Entry]:
    """List all other tensors: embedding, head, norms, biases, routers, factors of rotary frequencies."""

    def entry(name: str, tensor: torch.Tensor) -> _Entry:
        rounded = embedding != AS_IT_IS and name.endswith(_EMBEDDINGS)
        kind = EMBEDDING[embedding] if rounded else PLAIN[plain_type(name, tensor)]
        if tensor.shape[-1] % kind.columns:
            raise UserError(
                f"{name} has rows of {tensor.shape[-1]} columns, but {kind.name} needs a multiple of "
                f"{kind.columns}; choose another --embedding"
            )

        def make() -> NDArray[Any]:
            if rounded:
                return round_rows(tensor.float().numpy(), embedding)
            values = tensor.float() if kind.name == "F32" else tensor
            if name.endswith("norm.weight"):
                values = values + header.architecture.norm_shift
            ordered = _ordered(stored, header.architecture, name, values)
            return ordered.contiguous().view(torch.uint8).numpy()

        # llama.cpp reads the gate of a shared expert as a vector.
        shape = tensor.shape[-1:] if name.endswith("shared_expert_gate.weight") else tensor.shape
        return _Entry(header.name_of(name), kind, tuple(shape), make)

    def constant(name: str, values: NDArray[np.float32]) -> _Entry:
        return _Entry(f"{name}.weight", PLAIN["F32"], values.shape, lambda: values.view(np.uint8))

    return [
        *(constant(name, values) for name, values in header.factors.items()),
        *(entry(name, tensor) for name, tensor in stored.tensors.items()),
    ]


def _write(writer: gguf.GGUFWriter, entries: list[_Entry], path: Path) -> None:
    for entry in entries:
        # Not by add_tensor_info, which refuses types that gguf does not know.
        number: Any = entry.kind.number
        writer.tensors[-1][entry.name] = TensorInfo(entry.shape, number, entry.size)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with Progress("export", len(entries), "tensor", say_on_stdout) as step:
        for entry in entries:
            writer.write_tensor_data(entry.make())
            step()
    writer.flush()
