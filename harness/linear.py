"""A linear layer whose weights stay packed trits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from harness.backends import Backend
from harness.ops import ternary_linear

# Everything that may be stored of one matrix.
PACKED = ("trits", "scale", "shift", "permutation", "row_factor", "scale_factor", "shift_factor")
# What is made of it for the kernels.
LAYOUT = ("words", "grid", "order")

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TernaryLinear(nn.Module):
    """``nn.Linear`` with the weights ``alpha * t + mu``, stored as `reference.packing` describes.

    The tensors of the checkpoint are its buffers, so what is saved is what was loaded, bit for bit.
    Changing the module's dtype never changes alpha and mu.

    Parameters
    ----------
    in_features, out_features : int
        Columns m and rows n.
    block_size : int
        Columns that share alpha and mu.
    grid : {"float16", "int8"}
        What alpha and mu are stored in.
    permuted : bool
        Whether there is a permutation.
    bias : bool
        Whether there is a bias.
    dtype : torch.dtype
        What weights are rounded to: the dtype that calibration saw them in.

    Attributes
    ----------
    trits, scale, shift, permutation, row_factor, scale_factor, shift_factor : tensors
        As in the checkpoint; `permutation` is None where it is the identity, factors in float16 grids.
    weight : (n, m) tensor or None
        Dense weights, if they are kept (`keep_dense`).
    words, grid, order : tensors or None
        The layout of the packed kernels, if they are used (`use_kernels`). With neither of these, dense
        weights are made at every call.
    """

    trits: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    weight: torch.Tensor | None
    words: torch.Tensor | None
    grid: torch.Tensor | None
    order: torch.Tensor | None
    bias: torch.Tensor | None
    permutation: torch.Tensor | None
    row_factor: torch.Tensor | None
    scale_factor: torch.Tensor | None
    shift_factor: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_size: int,
        grid: str,
        permuted: bool,
        bias: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.weight_dtype = block_size, dtype
        stored = stored_parts(out_features, in_features, block_size, grid, permuted)
        for name in PACKED:
            kind, shape = stored.get(name, (None, None))
            self.register_buffer(name, None if shape is None else torch.zeros(shape, dtype=kind))
        for name in ("weight", *LAYOUT):
            self.register_buffer(name, None, persistent=False)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None
        )

    def dequantize(self) -> torch.Tensor:
        """The (n, m) weights, columns in their original order, in the dtype that calibration saw."""
        block = torch.arange(self.in_features, device=self.trits.device) // self.block_size
        alpha, mu = (
            self._values(self.scale, self.scale_factor)[:, block],
            self._values(self.shift, self.shift_factor)[:, block],
        )
        ordered = (alpha * unpack_base3(self.trits, self.in_features) + mu).to(self.weight_dtype)
        if self.permutation is None:
            return ordered
        weight = torch.empty_like(ordered)
        weight[:, self.permutation.long()] = ordered
        return weight

    def _values(self, grid: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
        """alpha or mu of every block, (n, blocks) float32."""
        if factor is None or self.row_factor is None:
            return grid.float()
        return self.row_factor.float()[:, None] * factor.float() * grid

    def _grids(self) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and mu of every block as the kernels take them: float16 if they are stored so."""
        if self.row_factor is None:
            return self.scale, self.shift
        return self._values(self.scale, self.scale_factor), self._values(self.shift, self.shift_factor)

    def keep_dense(self, keep: bool) -> None:
        """Keep dense weights beside the packed ones, for speed; or drop them, for memory."""
        self.weight = self.dequantize() if keep else None
        self.words = self.grid = self.order = None

    def use_kernels(self, backend: Backend) -> None:
        """Multiply by the packed trits themselves, laid out by the GPU backend; drops dense weights."""
        order = torch.arange(self.in_features) if self.permutation is None else self.permutation.long()
        layout = backend.function("matmul.lay_out")(
            *map(backend.to_device, (self.trits, *self._grids(), order.to(self.trits.device))),
            self.block_size,
        )
        self.words, self.order = (
            torch.from_dlpack(array.view("int32")) for array in (layout.words, layout.permutation)
        )
        self.grid = torch.from_dlpack(layout.grid)
        self.weight = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., m) to (..., n), in the dtype of x."""
        if self.words is not None:
            rows = x.reshape(-1, self.in_features)
            y = ternary_linear(rows, self.words, self.grid, self.order, self.block_size)
            y = y.view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias
        weight = self.dequantize() if self.weight is None else self.weight
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """What is printed of the module."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"block_size={self.block_size}, bias={self.bias is not None}, "
            f"permuted={self.permutation is not None}, dense={self.weight is not None}, "
            f"kernels={self.words is not None}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # What converts floating-point tensors leaves integers alone, and what moves tensors moves both.
        kept = {name: getattr(self, name) for name in (*PACKED, *LAYOUT)}
        kept = {name: tensor for name, tensor in kept.items() if tensor is not None}
        for name, tensor in kept.items():
            setattr(self, name, tensor.view(_BITS[tensor.element_size()]))
        try:
            return super()._apply(fn, recurse)
        finally:
            for name, tensor in kept.items():
                setattr(self, name, getattr(self, name).view(tensor.dtype))


def stored_parts(
    rows: int, columns: int, block_size: int, grid: str, permuted: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Types and shapes of the tensors that hold one matrix."""
    blocks = -(-columns // block_size)
    kind = getattr(torch, grid)
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "trits": (torch.uint8, (rows, -(-columns // 5))),
        "scale": (kind, (rows, blocks)),
        "shift": (kind, (rows, blocks)),
    }
    if grid == "int8":
        parts["row_factor"] = (torch.float16, (rows,))
        parts["scale_factor"] = parts["shift_factor"] = (torch.float16, (blocks,))
    if permuted:
        parts["permutation"] = (getattr(torch, str(permutation_dtype(columns))), (columns,))
    return parts


def permutation_dtype(columns: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds the index of every column."""
    return np.min_scalar_type(columns - 1)


def unpack_base3(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Trits of bytes that are known to be sound, (..., ceil(count / 5)) uint8 to (..., count) int8."""
    places = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=packed.device)
    digits = (packed[..., None] // places % 3).flatten(-2)
    return digits[..., :count].to(torch.int8) - 1


def require_base3(packed: torch.Tensor, count: int) -> None:
    """Refuse bytes that are not the code of trits.

    Raises
    ------
    ValueError
        If a byte is above 242, or the last of a row is filled up with something other than t = 0.
    """
    if (packed > 3**5 - 1).any():
        byte = int(packed[packed > 3**5 - 1][0])
        raise ValueError(f"byte {byte} is not the code of 5 trits")
    filling = unpack_base3(packed[..., -1:], 5)[..., count - 5 * (packed.shape[-1] - 1) :]
    if filling.any():
        raise ValueError(f"the last byte must be filled up with t = 0 beyond trit {count}")
