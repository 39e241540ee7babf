"""Format of a ternary model on disk: a Hugging Face folder whose linear layers are packed trits.

`reference.packing` describes the tensors of a linear layer byte by byte. In addition, config.json has a
``quantization_config``:

    quant_method     "pt2_llm"
    format_version   2; version 1 is read too
    block_size       columns that share alpha and mu
    grid             storage type of alpha and mu: "float16" or "int8"
    symmetric        whether mu is 0 everywhere, and not stored; false if absent, as in the first checkpoints
    modules          names of the packed layers
    shared_inputs    groups of packed layers that read the same input, as observed in calibration; absent in
                     the first checkpoints
    unpermuted       packed layers whose permutation is the identity and therefore not stored; any other
                     layer without a permutation is damaged
    coded            embedding and head, if stored as `harness.ternary.embedding` describes
    weight_dtype     dtype that dequantized weights are rounded to, as in calibration; by default, the dtype
                     in config.json

and an entry beside it, since version 2:

    transformers_weights   the sentence of `harness.ternary.notice`. It names no file, so transformers refuses
                           to load the model where this package is not imported

transformers defines everything else.

Sizes: a ternarized weight of SmolLM2-135M takes 1.903 bits, alpha, mu and permutation included; its
checkpoint 82 MB, 57 of them for the embedding in bfloat16. A model of Llama-7B's shape takes 2.03 GB of
weight files, 1.93 GB with alpha and mu in 8 bits, 1.67 GB with embedding and head in 8 bits as well.

What 8 bits cost on SmolLM2-135M: with int8 grids, which calibration uses as they are stored, the mean
relative output error is 0.0468 instead of 0.0449 and the perplexity 804.6 instead of 804.5, at 1.79 instead
of 1.90 bits per weight (benchmarks/grids.json). With embedding and head in 8 bits as well they are 0.0437
and 743, in 52 MB instead of 82 (benchmarks/embedding.json): no better at this size, as rounding changes
what every later layer is fitted to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from harness.backends import Backend
from harness.compute import dtype_name
from harness.errors import UserError
from harness.models.folder import CONFIG, read_config
from reference.packing import READABLE_VERSIONS
from reference.types import GRIDS, CodedGrid, TernaryMatrix

QUANT_METHOD = "pt2_llm"
# Allowed types of a model's weights.
MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def packed_tensors(name: str, matrix: TernaryMatrix, backend: Backend) -> dict[str, torch.Tensor]:
    """Pack one matrix; return its tensors by their names in the checkpoint."""
    columns = matrix.trits.shape[1]
    packed = backend.function("packing.pack_base3")(matrix.trits)
    parts = {"trits": backend.to_host(packed)}
    for part in ("scale", "shift"):
        grid = backend.to_host(getattr(matrix, part))
        if grid is None:
            continue
        if isinstance(grid, CodedGrid):
            parts |= {part: grid.codes, f"{part}_factor": grid.block[0], "row_factor": grid.row[:, 0]}
        else:
            parts[part] = grid
    permutation = backend.to_host(matrix.permutation)
    if not np.array_equal(permutation, np.arange(columns)):
        parts["permutation"] = permutation.astype(permutation_dtype(columns))
    return {f"{name}.{part}": torch.from_numpy(np.ascontiguousarray(value)) for part, value in parts.items()}


def packed_bytes(
    rows: int, columns: int, block_size: int, grid: str, permuted: bool, symmetric: bool = False
) -> int:
    """Count the bytes of one packed matrix, without its bias."""
    parts = stored_parts(rows, columns, block_size, grid, permuted, symmetric).values()
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in parts)


def is_ternary(folder: Path) -> bool:
    """Whether the config.json of a folder names this format."""
    if not (folder / CONFIG).is_file():
        return False
    quantization = read_config(folder).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


@dataclass(frozen=True)
class StoredLayers:
    """The entries of a checkpoint's ``quantization_config``."""

    block_size: int
    grid: str
    modules: list[str]
    unpermuted: list[str]
    shared_inputs: list[list[str]] | None
    coded: list[str]
    symmetric: bool = False


def stored_layers(quantization: dict[str, Any], where: str) -> StoredLayers:
    """Parse and check the ``quantization_config`` of a checkpoint; errors name `where` it was read from.

    Raises
    ------
    UserError
        If its version is not supported, or an entry is missing or malformed.
    """
    version = quantization.get("format_version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise UserError(f"{where} has format version {version!r}; this program reads versions {readable}")
    modules: Any = quantization.get("modules")
    unpermuted: Any = quantization.get("unpermuted")
    block_size = quantization.get("block_size")
    coded = quantization.get("coded", [])  # absent in the first checkpoints
    for entry, names in (("modules", modules), ("unpermuted", unpermuted), ("coded", coded)):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{where}: {entry} of quantization_config must be a list of names")
    if type(block_size) is not int or block_size < 1:
        raise UserError(f"{where}: block_size of quantization_config must be a positive integer")
    grid = quantization.get("grid", "float16")  # absent in the first checkpoints
    if grid not in GRIDS:
        raise UserError(f"{where}: grid of quantization_config is {grid!r}, not one of {', '.join(GRIDS)}")
    symmetric = quantization.get("symmetric", False)
    if type(symmetric) is not bool:
        raise UserError(f"{where}: symmetric of quantization_config must be true or false")
    shared = quantization.get("shared_inputs")  # absent in the first checkpoints
    if shared is not None:
        groups = shared if isinstance(shared, list) and all(isinstance(g, list) for g in shared) else [[None]]
        members = [name for group in groups for name in group]
        once = all(isinstance(name, str) for name in members) and len(set(members)) == len(members)
        if not once or not set(members) <= set(modules):
            raise UserError(f"{where}: shared_inputs of quantization_config must be groups of modules")
    return StoredLayers(block_size, grid, modules, unpermuted, shared, coded, symmetric)


def named_dtype(name: Any) -> torch.dtype:
    """Return the dtype that a config names.

    Raises
    ------
    UserError
        If a model cannot have it.
    """
    dtypes = {dtype_name(dtype): dtype for dtype in MODEL_DTYPES}
    if name not in dtypes:
        raise UserError(f"config.json: dtype is {name!r}, but must be one of {', '.join(dtypes)}")
    return dtypes[name]


# All tensors that may be stored for one matrix.
PACKED = ("trits", "scale", "shift", "permutation", "row_factor", "scale_factor", "shift_factor")


def stored_parts(
    rows: int, columns: int, block_size: int, grid: str, permuted: bool, symmetric: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the dtypes and shapes of the tensors that store one matrix."""
    blocks = -(-columns // block_size)
    kind = getattr(torch, grid)
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "trits": (torch.uint8, (rows, -(-columns // 5))),
    }
    for part in ("scale",) if symmetric else ("scale", "shift"):
        parts[part] = (kind, (rows, blocks))
        if grid == "int8":
            parts["row_factor"] = (torch.float16, (rows,))
            parts[f"{part}_factor"] = (torch.float16, (blocks,))
    if permuted:
        parts["permutation"] = (getattr(torch, str(permutation_dtype(columns))), (columns,))
    return parts


def permutation_dtype(columns: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds every column index."""
    return np.min_scalar_type(columns - 1)


def unpack_base3(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Unpack trits from valid bytes: (..., ceil(count / 5)) uint8 to (..., count) int8."""
    # Without a tensor of constants: a CUDA graph cannot copy one from the host.
    digits = torch.stack([packed // 3**i % 3 for i in range(5)], -1).flatten(-2)
    return digits[..., :count].to(torch.int8) - 1


def pack_base3(trits: torch.Tensor) -> torch.Tensor:
    """Pack valid trits into bytes, the inverse of `unpack_base3`."""
    filled = nn.functional.pad(trits + 1, (0, -trits.shape[-1] % 5), value=1).to(torch.uint8)
    digits = filled.unflatten(-1, (-1, 5)).unbind(-1)
    return torch.stack([digit * 3**i for i, digit in enumerate(digits)]).sum(0, dtype=torch.uint8)


def require_base3(packed: torch.Tensor, count: int) -> None:
    """Refuse bytes that do not encode trits.

    Raises
    ------
    ValueError
        If a byte is above 242, or the last byte of a row is padded with anything but t = 0.
    """
    if (packed > 3**5 - 1).any():
        byte = int(packed[packed > 3**5 - 1][0])
        raise ValueError(f"byte {byte} is not the code of 5 trits")
    filling = unpack_base3(packed[..., -1:], 5)[..., count - 5 * (packed.shape[-1] - 1) :]
    if filling.any():
        raise ValueError(f"the last byte must be filled up with t = 0 beyond trit {count}")
