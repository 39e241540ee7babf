"""Export a ternary checkpoint to a folder that mlx_lm loads, in MLX's affine groups of 2 bits.

A row is cut into groups of 32, 64 or 128 columns. A layer is stored as

``NAME.weight``  uint32, (n, m / 16): column 16 w + j is in bits 2 j and 2 j + 1 of word w.
``NAME.scales``  float16, (n, m / group).
``NAME.biases``  float16, (n, m / group).

and a weight is scale * q + bias. Here scale = alpha, bias = mu - alpha and q = t + 1, so only the bias is
rounded; with mu = 0 nothing is. Each layer has the largest group that divides its rows and its blocks; a
block of several groups repeats its grid. Scales in bfloat16 would move weights by 8 to 10 % of alpha, so they
are float16 in a bfloat16 model too, and MLX computes such a model in float32 from its first product on.

Embedding and head keep their dtype, or are rounded to 8 bits in groups of the same layout.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from harness.errors import UserError
from harness.export.folder import require_no_other_model, write_folder
from harness.export.source import (
    AS_IT_IS,
    Exported,
    Rounding,
    Stored,
    read_exportable,
    require_outside,
    rounded_offset,
)
from harness.export.tensors import TernaryTensor, ternary_tensors
from harness.models.folder import CONFIG, read_config, require_free, require_space
from harness.progress import Progress, say_on_stdout
from harness.runtimes.containers import MLX_GROUPS, Container, smallest
from harness.runtimes.features import Refused, refusals_of
from harness.runtimes.mlx_architectures import architecture_of, settings_of
from harness.words import counted
from reference.types import TernaryMatrix

WEIGHTS = "model.safetensors"
QUANTIZATION = "quantization"  # entry of config.json
EIGHT_BITS = "8bit"
BITS = 2
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


def export_mlx(
    folder: Path,
    out: Path,
    force: bool = False,
    trust_remote_code: bool = False,
    embedding: str = AS_IT_IS,
) -> Exported:
    """Export a checkpoint without reordering to a folder for mlx_lm.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    out : Path
        The folder.
    force : bool
        Whether to write into a folder that is not empty.
    trust_remote_code : bool
        Whether Python code shipped with the model may run.
    embedding : {"as-it-is", "8bit"}
        How embedding and head are stored.

    Returns
    -------
    Exported

    Raises
    ------
    UserError
        If the checkpoint is damaged or reordered, if mlx_lm does not support a feature of the model, if no
        group of MLX holds a matrix, or if the folder is inside the checkpoint, contains another model, or
        cannot be written.
    """
    require_outside(folder, out)
    require_free(out, force)
    require_no_other_model(out, WEIGHTS if _is_export(out) else None)
    stored = read_exportable(folder, trust_remote_code)
    with refusals_of(folder):
        architecture = architecture_of(stored.model)
        settings = settings_of(stored.model, stored.tensors)
        groups = {tensor: _group(stored, tensor) for tensor in ternary_tensors(stored)}
    rounding = Rounding()
    tensors: dict[str, torch.Tensor] = {}
    quantized: dict[str, dict[str, Any]] = {}
    for stored_name, tensor in stored.tensors.items():
        name = architecture.name_of(stored_name)
        if embedding == EIGHT_BITS and name.endswith(_EMBEDDINGS):
            module = name.removesuffix(".weight")
            parts, group = pack_8_bits(tensor, name)
            tensors |= {f"{module}.{part}": values for part, values in parts.items()}
            quantized[module] = {"group_size": group, "bits": 8, "mode": "affine"}
        else:
            tensors[name] = tensor.contiguous()
    weights = weight_bytes = 0
    with Progress("export", len(groups), "tensor", say_on_stdout) as step:
        for ternary, held in groups.items():
            name = architecture.name_of(ternary.name)
            packed = [
                pack_mlx(matrix, held.columns, module, rounding)
                for module, matrix in zip(ternary.modules, ternary.matrices(stored), strict=True)
            ]
            for part in packed[0]:
                values = np.ascontiguousarray(np.concatenate([one[part] for one in packed]))
                tensors[f"{name}.{part}"] = torch.from_numpy(values.reshape(*ternary.shape[:-1], -1))
                weight_bytes += values.nbytes
            weights += int(np.prod(ternary.shape))
            quantized[name] = {"group_size": held.columns, "bits": BITS, "mode": "affine"}
            step()
    counts: Counter[int] = Counter()
    for ternary, held in groups.items():
        counts[held.columns] += len(ternary.modules)
    common = {"group_size": counts.most_common(1)[0][0], "bits": BITS, "mode": "affine"}
    settings[QUANTIZATION] = common | {name: own for name, own in quantized.items() if own != common}
    require_space(out, sum(tensor.nbytes for tensor in tensors.values()))
    write_folder(stored, out, WEIGHTS, tensors, "mlx", settings)
    size = sum(file.stat().st_size for file in out.iterdir() if file.is_file())
    notes = tuple(f"groups of {columns} hold {counted(count, 'matrix')}" for columns, count in counts.items())
    return Exported(out, size, weights, weight_bytes, rounding, notes)


def pack_mlx(matrix: TernaryMatrix, group: int, name: str, rounding: Rounding) -> dict[str, NDArray[Any]]:
    """Encode a matrix in groups of 2 bits.

    Parameters
    ----------
    matrix : TernaryMatrix
        (n, m) in the original order; `group` divides m and every block.
    group : int
        Columns of a group.
    name : str
        Name of the layer, for error messages.
    rounding : Rounding
        The rounding errors of the matrix are added to it.

    Returns
    -------
    dict
        "weight", "scales" and "biases" as in this module's docstring.

    Raises
    ------
    UserError
        If mu - alpha overflows float16.
    """
    block = np.arange(0, matrix.trits.shape[1], group) // matrix.block_size  # of every group
    offset = rounded_offset(matrix, name, "in which MLX stores it here", rounding)
    return {
        "weight": _words((matrix.trits + 1).astype(np.uint32), BITS),
        "scales": matrix.scale[:, block],
        "biases": offset[:, block],
    }


def pack_8_bits(tensor: torch.Tensor, name: str) -> tuple[dict[str, torch.Tensor], int]:
    """Round an embedding to 8 bits; return its tensors and the columns of a group.

    Raises
    ------
    UserError
        If no group divides its rows.
    """
    columns = tensor.shape[1]
    group = next((held.columns for held in MLX_GROUPS if columns % held.columns == 0), None)
    if group is None:
        raise UserError(f"{name} has rows of {columns} columns, but MLX needs a multiple of 32 to round it")
    values = tensor.float().numpy().reshape(len(tensor), -1, group)
    lowest = values.min(axis=-1, keepdims=True)
    step = (values.max(axis=-1, keepdims=True) - lowest) / 255
    digits = np.divide(values - lowest, step, out=np.zeros_like(values), where=step > 0)
    words = _words(np.rint(digits).astype(np.uint32).reshape(len(tensor), -1), 8)
    # In float32, unless the model is a float16 one: what an embedding puts out has the dtype of its scales.
    kind = np.float16 if tensor.dtype == torch.float16 else np.float32
    parts = {"weight": words, "scales": step[..., 0].astype(kind), "biases": lowest[..., 0].astype(kind)}
    return {part: torch.from_numpy(values) for part, values in parts.items()}, group


def _words(digits: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """Pack digits of 2 or 8 bits into words of 32 bits, the first in the lowest bits."""
    held = digits.reshape(len(digits), -1, 32 // bits)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return np.bitwise_or.reduce(held << shifts, axis=-1)


def _group(stored: Stored, tensor: TernaryTensor) -> Container:
    """The largest group that holds a tensor."""
    block_size = stored.layers[tensor.modules[0]].block_size
    held, lacking = smallest(MLX_GROUPS, tensor.shape[-1], block_size, symmetric=False)
    if held is None:
        raise Refused(f"MLX cannot hold {tensor.name}, as it {list(lacking.values())[-1]}")
    return held


def _is_export(out: Path) -> bool:
    """Whether a folder has what an earlier export wrote."""
    return (out / CONFIG).is_file() and QUANTIZATION in read_config(out)
