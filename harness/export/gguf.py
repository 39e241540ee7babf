"""Export a ternary checkpoint to a GGUF file of type Q4_1.

Q4_1 stores 32 columns in 20 bytes: d and m in float16, then 16 bytes; byte i has column i in its low
four bits and column i + 16 in its high four. A weight is d * q + m. Here d = alpha, m = mu - alpha
and q = t + 1, so only m is rounded. The price is four bits for three values: 5 bits per weight in all.

All other tensors keep their dtype, except vectors: llama.cpp needs them in float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from harness.errors import UserError
from harness.export.gguf_tokenizer import add_tokenizer
from harness.export.source import (
    Exported,
    Rounding,
    Stored,
    half_unit,
    read_unpermuted,
    require_outside,
)
from harness.models.folder import require_free, require_space
from harness.progress import Progress, say_on_stdout
from reference.types import TernaryMatrix

COLUMNS = gguf.GGML_QUANT_SIZES[Type.Q4_1][0]

# The biases that transformers reads back from GGUF; it silently drops all others.
QKV_BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")


@dataclass(frozen=True)
class Architecture:
    """How GGUF names and lays out the tensors of an architecture.

    If `interleaved`, rotary embeddings rotate rows 2i and 2i + 1 of each q and k head together; in
    transformers they rotate row i of the first half of the head with row i of the second half.
    """

    arch: gguf.MODEL_ARCH
    interleaved: bool
    biases: tuple[str, ...] = ()


ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, True),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, False, QKV_BIASES),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, False),
}

_PLAIN = {torch.bfloat16: Type.BF16, torch.float16: Type.F16, torch.float32: Type.F32}


@dataclass(frozen=True)
class _Entry:
    """A tensor to write; `make` computes its data only when it is written."""

    name: str
    kind: Type
    shape: tuple[int, ...]
    make: Callable[[], NDArray[Any]]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return gguf.quant_shape_to_byte_shape(self.shape, self.kind)


def export_gguf(folder: Path, out: Path, force: bool = False, trust_remote_code: bool = False) -> Exported:
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

    Returns
    -------
    Exported

    Raises
    ------
    UserError
        If the checkpoint is damaged or reordered, if GGUF or transformers' GGUF reader does not support
        a feature of the model, if a group of 32 columns spans two blocks, or if the file is inside the
        checkpoint or cannot be written.

    Notes
    -----
    With d and m as stored, each weight is float32(alpha) * q + float32(m), where
    abs(m - (mu - alpha)) is at most half a unit in the last place of float16.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder; pass a file name to --out")
    require_outside(folder, out)
    require_free(out.parent, force=True)
    if out.exists() and not force:
        raise UserError(f"{out} exists; choose another --out, or pass --force to overwrite it")
    stored = read_unpermuted(folder, trust_remote_code)
    architecture = _architecture(stored)
    rounding = Rounding()
    entries = _entries(stored, architecture, rounding)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture.arch])
    _add_settings(writer, stored.config, folder)
    add_tokenizer(writer, stored.tokenizer, stored.config)
    require_space(out, sum(int(np.prod(entry.byte_shape)) for entry in entries))

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
    quantized = [entry for entry in entries if entry.kind == Type.Q4_1]
    return Exported(
        out,
        out.stat().st_size,
        sum(int(np.prod(entry.shape)) for entry in quantized),
        sum(int(np.prod(entry.byte_shape)) for entry in quantized),
        rounding,
    )


def pack_q4_1(matrix: TernaryMatrix, name: str, rounding: Rounding) -> NDArray[np.uint8]:
    """Encode a matrix in Q4_1.

    Parameters
    ----------
    matrix : TernaryMatrix
        (n, m) in the original order, every group of 32 columns within one block.
    name : str
        Name of the layer, for error messages.
    rounding : Rounding
        The rounding errors of the matrix are added to it.

    Returns
    -------
    (n, m / 32 * 20) uint8

    Raises
    ------
    UserError
        If mu - alpha overflows float16.
    """
    n, m = matrix.trits.shape
    alpha, mu = matrix.scale.astype(np.float64), matrix.shift.astype(np.float64)
    exact = mu - alpha
    with np.errstate(over="ignore"):
        offset = exact.astype(np.float16)
    if not np.isfinite(offset).all():
        raise UserError(f"{name}: mu - alpha of a block overflows float16, in which Q4_1 stores it")
    varied = alpha != 0
    moved = np.abs(offset - exact)[varied]
    rounding.add(moved, half_unit(exact[varied]), alpha[varied], mu[varied])

    block = np.arange(0, m, COLUMNS) // matrix.block_size  # of every 32 columns
    digits = (matrix.trits + 1).astype(np.uint8).reshape(n, -1, 2, COLUMNS // 2)
    parts = (
        matrix.scale[:, block, None].astype("<f2").view(np.uint8),
        offset[:, block, None].astype("<f2").view(np.uint8),
        digits[:, :, 0] | digits[:, :, 1] << 4,
    )
    return np.concatenate(parts, axis=-1).reshape(n, -1)


def interleave(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder the rows of q or k as GGUF's llama does: interleave the two halves of each head."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _architecture(stored: Stored) -> Architecture:
    """Return the model's GGUF architecture; refuse features that GGUF or its readers would drop."""
    config = stored.config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise UserError(
            f"{stored.folder} has model type {config.model_type}, which the GGUF export does not support; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    window = getattr(config, "sliding_window", None)
    faults = (
        (rope.get("rope_type", "default") != "default", f"its rope scaling ({rope.get('rope_type')})"),
        (rope.get("partial_rotary_factor") not in (None, 1), "its partial rotary embedding"),
        (window and window < config.max_position_embeddings, f"its attention in windows of {window} tokens"),
        (getattr(stored.model, "_auto_class", None) is not None, "the Python code shipped with it"),
        (config.hidden_act != "silu", f"its activation {config.hidden_act}"),
    )
    for fault, what in faults:
        if fault:
            raise UserError(f"{stored.folder} cannot be exported: {what} would be lost in the GGUF file")
    for name in stored.tensors:
        if name.endswith(".bias") and not name.endswith(architecture.biases):
            raise UserError(f"{stored.folder} cannot be exported: {name} would be lost in the GGUF file")
    return architecture


def _entries(stored: Stored, architecture: Architecture, rounding: Rounding) -> list[_Entry]:
    """List all tensors under their GGUF names; making a ternary one adds its error to `rounding`."""
    config = stored.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(architecture.arch, config.num_hidden_layers)

    def renamed(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"{stored.folder} cannot be exported: GGUF has no name for the tensor {name}")
        return found

    def ternary(module: str) -> _Entry:
        layer = stored.layers[module]
        rows, columns = layer.out_features, layer.in_features
        _require_groups(module, columns, layer.block_size)
        count = heads.get(module.rpartition(".")[2]) if architecture.interleaved else None

        def make() -> NDArray[Any]:
            packed = pack_q4_1(stored.matrix(module), module, rounding)
            return interleave(packed, count) if count else packed

        return _Entry(renamed(f"{module}.weight"), Type.Q4_1, (rows, columns), make)

    def plain(name: str, tensor: torch.Tensor) -> _Entry:
        kind = Type.F32 if tensor.ndim == 1 else _PLAIN.get(tensor.dtype)
        if kind is None:
            raise UserError(f"{name} is {tensor.dtype}, which GGUF does not support".replace("torch.", ""))

        def make() -> NDArray[Any]:
            values = tensor.float() if kind == Type.F32 else tensor
            return values.contiguous().view(torch.uint8).numpy()

        return _Entry(renamed(name), kind, tuple(tensor.shape), make)

    return [
        *(plain(name, tensor) for name, tensor in stored.tensors.items()),
        *(ternary(module) for module in stored.layers),
    ]


def _require_groups(module: str, columns: int, block_size: int) -> None:
    """Refuse blocks that begin or end inside a Q4_1 group of 32 columns."""
    if columns % COLUMNS:
        raise UserError(f"{module} has {columns} columns, but Q4_1 needs a multiple of {COLUMNS}")
    if block_size % COLUMNS and block_size < columns:
        raise UserError(
            f"{module} has blocks of {block_size} columns, which do not align with the groups of {COLUMNS} "
            f"columns of Q4_1; quantize with a --block-size that is a multiple of {COLUMNS}"
        )


def _add_settings(writer: gguf.GGUFWriter, config: Any, folder: Path) -> None:
    """Write the model's hyperparameters as GGUF metadata."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # transformers would take the bare name "mistral" for another architecture.
    writer.add_name(f"{folder.resolve().name} PT²-LLM")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _write(writer: gguf.GGUFWriter, entries: list[_Entry], path: Path) -> None:
    for entry in entries:
        size = int(np.prod(entry.byte_shape))
        writer.add_tensor_info(entry.name, entry.byte_shape, np.dtype(np.uint8), size, entry.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with Progress("export", len(entries), "tensor", say_on_stdout) as step:
        for entry in entries:
            writer.write_tensor_data(entry.make())
            step()
    writer.flush()
