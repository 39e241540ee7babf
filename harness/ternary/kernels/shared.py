"""Weights for the packed kernels, of one linear layer or of several that are given the same input."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from harness.ternary.kernels.operation import ternary_linear
from harness.ternary.kernels.tensors import PackedTensors

# Integers that hold numbers, and pairs of numbers.
_BITS = {"uint32": "int32", "uint16": "int16", "float16": "int16"}


_PAIRS = {"float16": "int32", "int8": "int16"}


class _Kept(NamedTuple):
    """Outputs that have not been asked for yet, and what they were computed from."""

    input: torch.Tensor
    version: int | None
    outputs: dict[int, torch.Tensor]


class PackedWeights(nn.Module):
    """Weights in the kernels' layout; one launch computes the outputs of all layers that share them.

    The outputs of the others are kept until they are called with the very same tensor, as the projections
    of attention and the two of a gated MLP are. A tensor that has been changed in place is another one,
    but for what PyTorch does not count changes of: tensors of its inference mode, and of a graph while it
    is traced.

    Parameters
    ----------
    layout : reference.layout.Layout
        Arrays of the backend.
    """

    words: torch.Tensor
    grid: torch.Tensor
    permutation: torch.Tensor
    row_factors: torch.Tensor | None
    block_factors: torch.Tensor | None

    def __init__(self, layout: Any) -> None:
        super().__init__()
        self.ends, self.columns, self.block_size = list(layout.ends), layout.columns, layout.block_size
        self.in_float16 = layout.in_float16
        self._kept: _Kept | None = None
        for name in ("words", "grid", "permutation", "row_factors", "block_factors"):
            array = getattr(layout, name)
            if array is not None:
                paired = name in ("grid", "block_factors")
                array = torch.from_dlpack(array.view((_PAIRS if paired else _BITS)[array.dtype.name]))
                array = array.squeeze(-1) if paired else array
            self.register_buffer(name, array, persistent=False)

    def tensors(self) -> PackedTensors:
        """The layout."""
        return PackedTensors(
            self.words,
            self.grid,
            self.permutation,
            self.row_factors,
            self.block_factors,
            self.ends,
            self.block_size,
            self.columns,
            self.in_float16,
        )

    def forward(self, x: torch.Tensor, part: int) -> torch.Tensor:
        """(..., m) to the (..., n) outputs of one of the layers, in the dtype of x."""
        # Read and written once each: other threads may run the same model on other tensors.
        kept, version = self._kept, _version(x)
        if kept is None or kept.input is not x or kept.version != version or part not in kept.outputs:
            kept = _Kept(x, version, self._outputs(x))
        output = kept.outputs.pop(part)
        self._kept = kept if kept.outputs else None
        return output

    def _outputs(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        """Those of all layers."""
        y = ternary_linear(x.reshape(-1, x.shape[-1]), *self.tensors())
        y = y.view(*x.shape[:-1], self.ends[-1])
        begins = [0, *self.ends[:-1]]
        # Slices rather than parts of a split, which nobody may change in place where gradients are kept.
        return {part: y[..., begins[part] : end] for part, end in enumerate(self.ends)}

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no use for outputs, and none can be made of tensors inside a graph of gradients.
        return {**self.__dict__, "_kept": None}


def _version(x: torch.Tensor) -> int | None:
    """How often a tensor has been changed in place, where that is counted."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version
