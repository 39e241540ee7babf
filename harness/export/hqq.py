"""Export a ternary checkpoint to HQQ's 2-bit layout.

The layout is that of hqq 0.2.8 (axis=1, packing "2bit_u8"). Read row by row, a matrix splits into G groups
of `group_size` weights. A layer is stored as

``NAME.W_q``    uint8, (G / 4, group_size): row g holds the digits q of groups g, g + G/4, g + G/2 and
                g + 3G/4, two bits each, the first in the highest bits.
``NAME.scale``  float16, (G, 1).
``NAME.zero``   float16, (G, 1).

and a weight is (q - zero) * scale. Here scale = alpha, zero = 1 - mu / alpha and q = t + 1, so only zero
is rounded. If alpha is 0, zero is undefined; then scale = mu, zero = 0 and q = 1, which is exact. The
same is used if zero overflows float16, because t is negligible beside mu then.

The length of a row must be a multiple of HQQ's group size. If it is no multiple of the block size, the
group size is the greatest common divisor of both, and each group repeats the grid of its block.

Each layer also has the scalars of HQQLinear.state_dict(), encoded as hqq encodes them for safetensors, so
that HQQLinear(None, None).load_state_dict() loads the layer's tensors. Unquantized tensors are unchanged.
The file is named qmodel.safetensors, after hqq's qmodel.pt. From a model.safetensors with these names,
transformers would load no matrix and initialize all of them at random.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from harness.errors import UserError
from harness.export.folder import require_no_other_model, write_folder
from harness.export.source import (
    Exported,
    Rounding,
    Stored,
    half_unit,
    read_exportable,
    require_outside,
)
from harness.models.folder import require_free, require_space
from harness.progress import Progress, say_on_stdout
from reference.types import TernaryMatrix

WEIGHTS = "qmodel.safetensors"
GROUP_MULTIPLE = 8  # hqq refuses other group sizes
PACKED_GROUPS = 4  # groups per byte

# hqq's record of how a layer was quantized. The last two belong to its own optimizer, which did not run.
_SETTINGS = {"nbits": 2, "axis": 1, "view_as_float": False, "channel_wise": True, "round_zero": False}
_STATE: dict[str, Any] = {
    **_SETTINGS,
    "optimize": False,
    "packing": "2bit_u8",
    "unpack_view_dtype": "torch.uint8",
    "compute_dtype": "torch.float16",
    "quant_scale": False,
    "quant_zero": False,
    "offload_meta": False,
    "encoded_state_dict": True,
    "stores_quant_config": True,
}


def export_hqq(folder: Path, out: Path, force: bool = False, trust_remote_code: bool = False) -> Exported:
    """Export a checkpoint without reordering to a folder in HQQ's layout.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    out : Path
        The folder to write; config.json appears in it only when it is complete.
    force : bool
        Whether the folder may contain files; those with the name of an exported file are overwritten.
    trust_remote_code : bool
        Whether Python code shipped with the model may run.

    Returns
    -------
    Exported

    Raises
    ------
    UserError
        If the checkpoint is damaged or reordered, if HQQ does not support its block size, or if the
        folder is inside the checkpoint, contains another model, or cannot be written.

    Notes
    -----
    With zero as stored, each weight is float32(alpha) * (q - float32(zero)), where
    abs(zero - (1 - mu / alpha)) is at most half a unit in the last place of float16. hqq itself computes
    the weight in float16, or in the dtype it is given, and rounds again.
    """
    require_outside(folder, out)
    require_free(out, force)
    require_no_other_model(out, WEIGHTS)
    stored = read_exportable(folder, trust_remote_code)
    rounding = Rounding()
    layers = {module: _group_size(stored, module) for module in stored.layers}
    tensors = {name: tensor.contiguous() for name, tensor in stored.tensors.items()}
    weights = weight_bytes = 0
    with Progress("export", len(layers), "tensor", say_on_stdout) as step:
        for module, group_size in layers.items():
            packed = pack_hqq(stored.matrix(module), group_size, rounding)
            for part, values in packed.items():
                tensors[f"{module}.{part}"] = torch.from_numpy(values)
                weight_bytes += values.nbytes
            linear = stored.layers[module]
            shape = (linear.out_features, linear.in_features)
            weights += shape[0] * shape[1]
            tensors |= {f"{module}.{key}": value for key, value in _state(shape, group_size).items()}
            step()
    require_space(out, sum(tensor.nbytes for tensor in tensors.values()))
    write_folder(stored, out, WEIGHTS, tensors, "pt", {"quantization_config": _quantization(layers)})
    size = sum(file.stat().st_size for file in out.iterdir() if file.is_file())
    return Exported(out, size, weights, weight_bytes, rounding)


def pack_hqq(matrix: TernaryMatrix, group_size: int, rounding: Rounding) -> dict[str, NDArray[Any]]:
    """Encode a matrix in HQQ's layout.

    Parameters
    ----------
    matrix : TernaryMatrix
        (n, m) in the original order; `group_size` divides m and every block, and n * m / group_size is
        a multiple of 4.
    group_size : int
        Weights in a group.
    rounding : Rounding
        The rounding errors of the matrix are added to it.

    Returns
    -------
    dict
        "W_q", "scale" and "zero" as in this module's docstring.
    """
    m = matrix.trits.shape[1]
    alpha, mu = matrix.scale.astype(np.float64), matrix.shift.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        exact = 1 - mu / alpha
        zero = exact.astype(np.float16)
    constant = ~np.isfinite(zero)
    zero[constant] = 0
    scale = np.where(constant, matrix.shift, matrix.scale)

    varied = alpha != 0
    with np.errstate(invalid="ignore"):
        moved = np.where(constant, np.abs(alpha), np.abs((zero - exact) * alpha))
        allowed = half_unit(np.where(varied, exact, 0)) * np.abs(alpha)
    rounding.add(moved[varied], allowed[varied], alpha[varied], mu[varied])

    digits = (matrix.trits + 1).astype(np.uint8)
    digits[np.repeat(constant, matrix.block_size, axis=1)[:, :m]] = 1
    quarters = digits.reshape(PACKED_GROUPS, -1, group_size)
    packed = quarters[0] << 6 | quarters[1] << 4 | quarters[2] << 2 | quarters[3]
    block = np.arange(0, m, group_size) // matrix.block_size  # of every group
    return {
        "W_q": packed,
        "scale": scale[:, block].reshape(-1, 1),
        "zero": zero[:, block].reshape(-1, 1),
    }


def _group_size(stored: Stored, module: str) -> int:
    """Return the largest group size that divides the rows and the blocks."""
    layer = stored.layers[module]
    rows, columns, block_size = layer.out_features, layer.in_features, layer.block_size
    size = columns if block_size >= columns else math.gcd(block_size, columns)
    if size % GROUP_MULTIPLE:
        raise UserError(
            f"{module} has blocks of {block_size} in rows of {columns} weights, which need groups of {size}; "
            f"HQQ needs a multiple of {GROUP_MULTIPLE}, so quantize with another --block-size"
        )
    if rows * columns // size % PACKED_GROUPS:
        raise UserError(
            f"{module} has {rows * columns // size} groups of {size} weights; HQQ needs a multiple of "
            f"{PACKED_GROUPS} groups, so quantize with another --block-size"
        )
    return size


def _state(shape: tuple[int, int], group_size: int) -> dict[str, torch.Tensor]:
    """Encode a layer's scalars as hqq does: strings as character codes, booleans as uint8."""
    state = {"shape": torch.tensor(shape), "group_size": torch.tensor(group_size, dtype=torch.int32)}
    for key, value in _STATE.items():
        if isinstance(value, str):
            state[key] = torch.tensor([ord(letter) for letter in value], dtype=torch.uint8)
        else:
            kind = torch.uint8 if isinstance(value, bool) else torch.int32
            state[key] = torch.tensor(int(value), dtype=kind)
    return state


def _quantization(layers: dict[str, int]) -> dict[str, Any]:
    """Make transformers' quantization_config: settings by the part of the name shared by all layers."""
    settings = {
        _tag(module): {"weight_quant_params": {**_SETTINGS, "group_size": group_size, "optimize": False}}
        for module, group_size in layers.items()
    }
    return {"quant_method": "hqq", "quant_config": settings, "skip_modules": ["lm_head"]}


def _tag(module: str) -> str:
    """Return the part of a module's name that all layers share, as hqq does."""
    return ".".join(
        part for part in module.split(".") if part not in ("model", "layers") and not part.isnumeric()
    )
