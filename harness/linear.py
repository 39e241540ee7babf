"""A linear layer whose weights stay packed trits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from harness.backends import Backend
from harness.compute import Compute
from harness.layout import Matrix
from harness.packed import PackedWeights
from reference.types import CodedGrid

# Everything that may be stored of one matrix.
PACKED = ("trits", "scale", "shift", "permutation", "row_factor", "scale_factor", "shift_factor")

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TernaryLinear(nn.Module):
    """``nn.Linear`` with the weights ``alpha * t + mu``, stored as `reference.packing` describes.

    The tensors of the checkpoint are its buffers; or, after `use_kernels`, the same numbers in the layout of
    the packed kernels, where a trit takes 2 bits instead of 1.6. What is saved is what was loaded, bit for
    bit, in either case. Changing the module's dtype never changes alpha and mu.

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
    trits, scale, shift, permutation, row_factor, scale_factor, shift_factor : tensors or None
        As in the checkpoint; `permutation` is None where it is the identity, factors in float16 grids, and
        all of them while kernels are used.
    weight : (n, m) tensor or None
        Dense weights, if they are kept (`keep_dense`). Without these and without kernels, they are made at
        every call.
    packed : PackedWeights or None
        What the kernels read, shared with layers that are given the same input.
    """

    trits: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    weight: torch.Tensor | None
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
        self.permuted = permuted
        self.packed: PackedWeights | None = None
        self.part = 0
        stored = stored_parts(out_features, in_features, block_size, grid, permuted)
        for name in PACKED:
            kind, shape = stored.get(name, (None, None))
            self.register_buffer(name, None if shape is None else torch.zeros(shape, dtype=kind))
        self.register_buffer("weight", None, persistent=False)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.trits.device if self.packed is None else self.packed.words.device

    def stored(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of this layer, by the names in `PACKED`."""
        if self.packed is None:
            tensors = {name: getattr(self, name) for name in PACKED}
        else:
            tensors = self.packed.tensors().part(self.part)._asdict()
            tensors["trits"] = pack_base3(tensors["trits"])
            kind = getattr(torch, str(permutation_dtype(self.in_features)))
            tensors["permutation"] = tensors["permutation"].to(kind) if self.permuted else None
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def matrix(self) -> Matrix:
        """The same with trits, and with a permutation in any case."""
        if self.packed is not None:
            return self.packed.tensors().part(self.part)
        tensors = self.stored()
        tensors["trits"] = unpack_base3(tensors["trits"], self.in_features)
        if "permutation" not in tensors:
            tensors["permutation"] = torch.arange(self.in_features, device=self.device)
        return Matrix(**tensors)

    def dequantize(self) -> torch.Tensor:
        """The (n, m) weights, columns in their original order, in the dtype that calibration saw."""
        return self.matrix().dequantize(self.block_size, self.weight_dtype)

    def keep_dense(self, keep: bool) -> None:
        """Keep dense weights beside the stored tensors, for speed; or drop them, for memory."""
        for name, tensor in self.stored().items():
            setattr(self, name, tensor)
        self.packed = None
        self.weight = self.dequantize() if keep else None

    def use_kernels(self, packed: PackedWeights, part: int) -> None:
        """Multiply by the packed trits themselves; drops the stored tensors, and dense weights.

        Parameters
        ----------
        packed : PackedWeights
            The weights of this layer in the kernels' layout, and perhaps those of others.
        part : int
            Which of them are this layer's.
        """
        self.packed, self.part = packed, part
        for name in (*PACKED, "weight"):
            setattr(self, name, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., m) to (..., n), in the dtype of x."""
        if self.packed is not None:
            y = self.packed(x, self.part)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        weight = self.dequantize() if self.weight is None else self.weight
        return nn.functional.linear(
            x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination.update({prefix + name: tensor for name, tensor in self.stored().items()})

    def _load_from_state_dict(self, *arguments: Any) -> None:
        if self.packed is not None:
            prefix, errors = arguments[1], arguments[-1]
            errors.append(
                f"{prefix[:-1]} is laid out for kernels and takes no weights; keep_dense undoes that"
            )
            return
        super()._load_from_state_dict(*arguments)
        if self.weight is not None:
            self.weight = self.dequantize()

    def extra_repr(self) -> str:
        """What is printed of the module."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"block_size={self.block_size}, bias={self.bias is not None}, "
            f"permuted={self.permuted}, dense={self.weight is not None}, kernels={self.packed is not None}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # What converts floating-point tensors leaves integers alone, and what moves tensors moves both.
        kept = {name: getattr(self, name) for name in PACKED}
        kept = {name: tensor for name, tensor in kept.items() if tensor is not None}
        for name, tensor in kept.items():
            setattr(self, name, tensor.view(_BITS[tensor.element_size()]))
        try:
            return super()._apply(fn, recurse)
        finally:
            for name, tensor in kept.items():
                setattr(self, name, getattr(self, name).view(tensor.dtype))


def use_kernels(layers: list[TernaryLinear], backend: Backend) -> None:
    """Let layers that are given the same input multiply by packed trits, in one launch.

    Layers whose blocks no fast kernel takes are left as they are.

    Parameters
    ----------
    layers : list of TernaryLinear
        At most three, of the same columns, block size and kind of grid.
    backend : Backend
        Lays them out.
    """
    if not backend.function("kernels.layout.can_be_tiled")(layers[0].block_size):
        return
    first = next(layers[0].buffers())
    # The backend works on the current device, whichever the layers are on, and on torch's stream there.
    with torch.cuda.device_of(first), Compute(first.device).queue(backend):
        layouts = [_lay_out(layer, backend) for layer in layers]
        packed = PackedWeights(backend.function("layout.join")(layouts))
    for part, layer in enumerate(layers):
        layer.use_kernels(packed, part)


def _lay_out(layer: TernaryLinear, backend: Backend) -> Any:
    stored = {name: backend.to_device(tensor) for name, tensor in layer.stored().items()}
    scale, shift = stored["scale"], stored["shift"]
    if "row_factor" in stored:
        row = stored["row_factor"][:, None]
        scale = CodedGrid(scale, row, stored["scale_factor"][None])
        shift = CodedGrid(shift, row, stored["shift_factor"][None])
    order = stored.get("permutation")
    if order is None:
        order = backend.to_device(torch.arange(layer.in_features, device=layer.device))
    return backend.function("layout.lay_out")(stored["trits"], scale, shift, order, layer.block_size)


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
    # No tensor of constants: a CUDA graph takes none from the host.
    digits = torch.stack([packed // 3**i % 3 for i in range(5)], -1).flatten(-2)
    return digits[..., :count].to(torch.int8) - 1


def pack_base3(trits: torch.Tensor) -> torch.Tensor:
    """Bytes of trits that are known to be sound, the inverse of `unpack_base3`."""
    filled = nn.functional.pad(trits + 1, (0, -trits.shape[-1] % 5), value=1).to(torch.uint8)
    digits = filled.unflatten(-1, (-1, 5)).unbind(-1)
    return torch.stack([digit * 3**i for i, digit in enumerate(digits)]).sum(0, dtype=torch.uint8)


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
