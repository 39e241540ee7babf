"""Packed weights of one linear layer, or of several layers that read the same input."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from harness.ternary.kernels.host import HostTensors, multiply_on_host
from harness.ternary.kernels.operation import PackedTensors, has_kernel_on_host, ternary_linear


class _Pending(NamedTuple):
    """Outputs not yet returned to their layers, and the input they were computed from."""

    input: torch.Tensor
    version: int | None
    with_gradients: bool
    outputs: dict[int, torch.Tensor]


class PackedWeights(nn.Module):
    """Weights in the kernels' layout; one launch computes the outputs of all layers that share them.

    The first layer called with an input launches the kernel. The outputs of the other layers are kept
    until these layers are called with the same tensor object, as for the q, k and v projections or the
    gate and up projections. An input changed in place counts as a new input. PyTorch does not track
    in-place changes in inference mode and while tracing a graph; there they go unnoticed.

    Parameters
    ----------
    tensors : PackedTensors or HostTensors
        The weights.
    """

    words: torch.Tensor
    grid: torch.Tensor
    permutation: torch.Tensor
    row_factors: torch.Tensor | None
    block_factors: torch.Tensor | None

    def __init__(self, tensors: PackedTensors | HostTensors) -> None:
        super().__init__()
        self.kind = type(tensors)
        self.ends, self.columns, self.block_size = tensors.ends, tensors.columns, tensors.block_size
        self.in_float16 = tensors.in_float16
        self._pending: _Pending | None = None
        for name in ("words", "grid", "permutation", "row_factors", "block_factors"):
            self.register_buffer(name, getattr(tensors, name), persistent=False)

    def tensors(self) -> PackedTensors | HostTensors:
        """The packed tensors."""
        return self.kind(
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
        """Map (..., m) to the (..., n) outputs of one of the layers, in the dtype of x."""
        # Read and write `_pending` once each: other threads may run the same model on other tensors.
        pending, version, with_gradients = self._pending, _version(x), torch.is_grad_enabled()
        if (
            pending is None
            or pending.input is not x
            or pending.version != version
            or pending.with_gradients != with_gradients
            or part not in pending.outputs
        ):
            pending = _Pending(x, version, with_gradients, self._outputs(x))
        output = pending.outputs.pop(part)
        self._pending = pending if pending.outputs else None
        return output

    def _outputs(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        """Compute the outputs of all layers."""
        rows, packed = x.reshape(-1, x.shape[-1]), self.tensors()
        # A torch operation is what compilation and gradients need; it takes as long as a small product.
        recorded = torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled())
        if has_kernel_on_host(packed, rows) and not recorded:
            y = multiply_on_host(rows, packed)
        else:
            y = ternary_linear(rows, *packed)
        y = y.view(*x.shape[:-1], self.ends[-1])
        begins = [0, *self.ends[:-1]]
        # Slices, because autograd forbids changing the results of a split in place.
        return {part: y[..., begins[part] : end] for part, end in enumerate(self.ends)}

    def __getstate__(self) -> dict[str, Any]:
        # A copy needs no outputs, and torch cannot deep-copy tensors inside an autograd graph.
        return {**self.__dict__, "_pending": None}


def _version(x: torch.Tensor) -> int | None:
    """Count the in-place changes of a tensor; None where PyTorch does not track them."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version
