"""A ternary checkpoint in the layout of HQQ at 2 bits.

The layout is that of hqq 0.2.8 (axis=1, packing "2bit_u8"). A matrix is read row by row as groups of
`group_size` weights; with the digits q of all groups as rows of a matrix of G rows,

``NAME.W_q``    uint8, (G / 4, group_size): row g holds the digits of groups g, g + G/4, g + G/2 and
                g + 3G/4, two bits each, the first in the highest bits.
``NAME.scale``  float16, (G, 1).
``NAME.zero``   float16, (G, 1).

and a weight is (q - zero) * scale. Here scale = alpha, zero = 1 - mu / alpha and q = t + 1, so zero is
all that is rounded. Where alpha is 0 there is no such zero; then scale = mu, zero = 0 and q = 1, which is
exact. The same serves where abs(zero) is beyond float16, as t then vanishes beside mu.

HQQ's groups must not end within a row, so where rows are no multiple of the block size, groups are
their greatest common divisor, and the grid of a block is repeated for each of its groups.

Beside these, each layer has the scalars of HQQLinear.state_dict(), encoded as hqq encodes them for
safetensors, so that HQQLinear(None, None).load_state_dict() takes the layer's tensors. What is not
ternary is stored as it was. The file is qmodel.safetensors, after hqq's qmodel.pt, as transformers
would fill a model from a model.safetensors with random weights where it does not know the names.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from harness.errors import UserError
from harness.export.source import (
    Exported,
    Rounding,
    Stored,
    half_unit,
    progress,
    read_unpermuted,
    require_outside,
)
from harness.files import write_json
from harness.models.folder import CONFIG, GENERATION, move_into, require_free, require_space, staged
from harness.ternary.writing import save_code
from reference.types import TernaryMatrix

WEIGHTS = "qmodel.safetensors"


# A GGUF file is a whole model by itself: a config.json beside it takes nothing from it.
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx")


GROUP_MULTIPLE = 8  # hqq takes no other groups


PACKED_GROUPS = 4


# What hqq keeps of how a layer was quantized; the last two are settings of its own search, which did not run.
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
    """Write a checkpoint that was made without reordering as a folder in HQQ's layout.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    out : Path
        The folder; it has a config.json only once it is whole.
    force : bool
        Whether it may hold something already; what has the name of a file of the export is replaced.
    trust_remote_code : bool
        Whether code that comes with the model may run.

    Returns
    -------
    Exported

    Raises
    ------
    UserError
        If the checkpoint is damaged or reordered, its blocks are no groups that HQQ has, or the folder lies
        inside the checkpoint, holds another model, or cannot be written.

    Notes
    -----
    With zero as stored, each weight is float32(alpha) * (q - float32(zero)), where
    abs(zero - (1 - mu / alpha)) is at most half a unit in the last place of float16. hqq itself
    computes this in float16, or in the type it is told, and rounds again.
    """
    require_outside(folder, out)
    require_free(out, force)
    _require_no_other_model(out)
    stored = read_unpermuted(folder, trust_remote_code)
    rounding = Rounding()
    layers = {module: _group_size(stored, module) for module in stored.layers}
    tensors = {name: tensor.contiguous() for name, tensor in stored.tensors.items()}
    weights = weight_bytes = 0
    with progress(len(layers)) as bar:
        for module, group_size in layers.items():
            packed = pack_hqq(stored.matrix(module), group_size, rounding)
            for part, values in packed.items():
                tensors[f"{module}.{part}"] = torch.from_numpy(values)
                weight_bytes += values.nbytes
            linear = stored.layers[module]
            shape = (linear.out_features, linear.in_features)
            weights += shape[0] * shape[1]
            tensors |= {f"{module}.{key}": value for key, value in _state(shape, group_size).items()}
            bar.update()
    require_space(out, sum(tensor.nbytes for tensor in tensors.values()))
    _write(stored, layers, tensors, out)
    size = sum(file.stat().st_size for file in out.iterdir() if file.is_file())
    return Exported(out, size, weights, weight_bytes, rounding)


def pack_hqq(matrix: TernaryMatrix, group_size: int, rounding: Rounding) -> dict[str, NDArray[Any]]:
    """A matrix in HQQ's layout, and what its zeros lost.

    Parameters
    ----------
    matrix : TernaryMatrix
        (n, m) in the original order; `group_size` divides m and every block, and n * m / group_size is
        a multiple of 4.
    group_size : int
        Weights in a group.
    rounding : Rounding
        Counts the matrix's blocks.

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


def _require_no_other_model(out: Path) -> None:
    """Refuse to put this model's config.json and tokenizer in the place of those of other weights."""
    entries = sorted(out.iterdir()) if out.is_dir() else []
    others = [entry.name for entry in entries if entry.suffix in OTHER_WEIGHTS and entry.name != WEIGHTS]
    if others:
        raise UserError(
            f"{out} holds another model's weights ({others[0]}), whose config.json would be replaced; "
            "choose another --out"
        )


def _group_size(stored: Stored, module: str) -> int:
    """The largest groups that end with the rows and with the blocks."""
    layer = stored.layers[module]
    rows, columns, block_size = layer.out_features, layer.in_features, layer.block_size
    size = columns if block_size >= columns else math.gcd(block_size, columns)
    if size % GROUP_MULTIPLE:
        raise UserError(
            f"{module} has blocks of {block_size} in rows of {columns} weights, which fall into "
            f"groups of {size}; HQQ's are multiples of {GROUP_MULTIPLE}"
        )
    if rows * columns // size % PACKED_GROUPS:
        raise UserError(
            f"{module} has {rows * columns // size} groups of {size} weights; HQQ packs multiples of "
            f"{PACKED_GROUPS} groups"
        )
    return size


def _state(shape: tuple[int, int], group_size: int) -> dict[str, torch.Tensor]:
    """The scalars of a layer, as hqq encodes them: text as character codes, truth values as bytes."""
    state = {"shape": torch.tensor(shape), "group_size": torch.tensor(group_size, dtype=torch.int32)}
    for key, value in _STATE.items():
        if isinstance(value, str):
            state[key] = torch.tensor([ord(letter) for letter in value], dtype=torch.uint8)
        else:
            kind = torch.uint8 if isinstance(value, bool) else torch.int32
            state[key] = torch.tensor(int(value), dtype=kind)
    return state


def _quantization(layers: dict[str, int]) -> dict[str, Any]:
    """transformers' description of it: settings by the part of a layer's name that all layers share."""
    settings = {
        _tag(module): {"weight_quant_params": {**_SETTINGS, "group_size": group_size, "optimize": False}}
        for module, group_size in layers.items()
    }
    return {"quant_method": "hqq", "quant_config": settings, "skip_modules": ["lm_head"]}


def _tag(module: str) -> str:
    return ".".join(
        part for part in module.split(".") if part not in ("model", "layers") and not part.isnumeric()
    )


def _write(stored: Stored, layers: dict[str, int], tensors: dict[str, torch.Tensor], out: Path) -> None:
    with staged(out) as folder:
        try:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            (folder / WEIGHTS).chmod(0o644)  # safetensors leaves it to the owner alone
            stored.tokenizer.save_pretrained(folder)
            if (stored.folder / GENERATION).is_file():
                shutil.copyfile(stored.folder / GENERATION, folder / GENERATION)
            save_code(stored.model, stored.config, folder)
            config = stored.config.to_dict()
            config["quantization_config"] = _quantization(layers)
            write_json(folder / CONFIG, config)
            move_into(folder, out, stale=(GENERATION,))
        except Exception as error:  # the tokenizer raises plain Exception where the disk is full
            raise UserError(f"{out} could not be written: {error}") from None
