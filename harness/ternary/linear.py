"""A linear layer with packed ternary weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.ternary.format import PACKED, pack_base3, permutation_dtype, stored_parts, unpack_base3
from harness.ternary.kernels.host import HostTensors, lay_out
from harness.ternary.kernels.shared import PackedWeights
from harness.ternary.kernels.tensors import Matrix

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TernaryLinear(nn.Module):
    """``nn.Linear`` with the weights ``alpha * t + mu``, stored as `reference.packing` describes.

    Its buffers are the tensors of the checkpoint. `use_kernels` replaces them with the same numbers in the
    layout of the packed kernels, at 2 bits per trit instead of 1.6. Either way, saving writes exactly the
    bits that were loaded. Changing the module's dtype never changes alpha and mu.

    Parameters
    ----------
    in_features, out_features : int
        Columns m and rows n.
    block_size : int
        Columns that share alpha and mu.
    grid : {"float16", "int8"}
        Storage type of alpha and mu.
    permuted : bool
        Whether there is a permutation.
    bias : bool
        Whether there is a bias.
    dtype : torch.dtype
        dtype that dequantized weights are rounded to, the same as during calibration.
    symmetric : bool
        Whether mu is 0 and not stored.
    transposed : bool
        Whether the plain layer is transformers' Conv1D, which holds its weights transposed.

    Attributes
    ----------
    trits, scale, shift, permutation, row_factor, scale_factor, shift_factor : tensors or None
        As in the checkpoint. `permutation` is None if it is the identity, `shift` and `shift_factor` are None
        if mu is 0, the factors are None for float16 grids, and all are None after `use_kernels`.
    dense : (n, m) tensor or None
        Dense weights, if kept (`keep_dense`). Without them and without kernels, every call dequantizes.
    weight : (n, m) tensor
        The dense weights; if none are kept, made anew by every access, and not to be changed in place.
    packed : PackedWeights or None
        Weights in the layout of the kernels, shared with layers that read the same input. A layer that is
        moved off the CPU gets dense weights instead of the layout of the CPU's kernel.
    """

    trits: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor | None
    dense: torch.Tensor | None
    weight: torch.Tensor
    bias: nn.Parameter | None
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
        symmetric: bool = False,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.weight_dtype = block_size, dtype
        self.permuted, self.symmetric, self.transposed = permuted, symmetric, transposed
        self.packed: PackedWeights | None = None
        self.part = 0
        stored = stored_parts(out_features, in_features, block_size, grid, permuted, symmetric)
        for name in PACKED:
            kind, shape = stored.get(name, (None, None))
            self.register_buffer(name, None if shape is None else torch.zeros(shape, dtype=kind))
        self.register_buffer("dense", None, persistent=False)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None
        )

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.trits.device if self.packed is None else self.packed.words.device

    def stored(self) -> dict[str, torch.Tensor]:
        """Tensors of this layer as a checkpoint stores them, by the names in `PACKED`."""
        if self.packed is None:
            tensors = {name: getattr(self, name) for name in PACKED}
        else:
            tensors = self.matrix()._asdict()
            tensors["trits"] = pack_base3(tensors["trits"])
            kind = getattr(torch, str(permutation_dtype(self.in_features)))
            tensors["permutation"] = tensors["permutation"].to(kind) if self.permuted else None
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def matrix(self) -> Matrix:
        """The layer's matrix with unpacked trits; its permutation is never None."""
        if self.packed is not None:
            matrix = self.packed.tensors().part(self.part)
            # The layout of the device has a mu in any case.
            return matrix._replace(shift=None, shift_factor=None) if self.symmetric else matrix
        tensors = self.stored()
        tensors["trits"] = unpack_base3(tensors["trits"], self.in_features)
        if "permutation" not in tensors:
            tensors["permutation"] = torch.arange(self.in_features, device=self.device)
        shift = tensors.pop("shift", None)
        return Matrix(shift=shift, **tensors)

    def dequantize(self) -> torch.Tensor:
        """Compute the (n, m) weights, columns in original order, in the dtype used during calibration."""
        return self.matrix().dequantize(self.block_size, self.weight_dtype)

    def plain(self) -> nn.Linear | Conv1D:
        """Make the plain layer with the dense weights and the bias of this one."""
        weight = self.dequantize() if self.dense is None else self.dense
        plain: nn.Linear | Conv1D
        with torch.device("meta"):
            if self.transposed:
                plain = Conv1D(self.out_features, self.in_features)
            else:
                plain = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        plain.weight = nn.Parameter(weight.T.contiguous() if self.transposed else weight)
        plain.register_parameter("bias", self.bias)
        return plain.train(self.training)

    def keep_dense(self, keep: bool) -> None:
        """Keep dense weights beside the stored tensors (faster), or drop them (smaller)."""
        for name, tensor in self.stored().items():
            setattr(self, name, tensor)
        self.packed = None
        self.dense = self.dequantize() if keep else None

    def use_kernels(self, packed: PackedWeights, part: int) -> None:
        """Multiply by packed trits from now on; drop the stored tensors and the dense weights.

        Parameters
        ----------
        packed : PackedWeights
            Weights in the kernels' layout, of this layer and possibly of others.
        part : int
            Index of this layer among them.
        """
        self.packed, self.part = packed, part
        for name in (*PACKED, "dense"):
            setattr(self, name, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., m) to (..., n), in the dtype of x."""
        if not x.is_floating_point():
            raise RuntimeError(f"activations are {x.dtype}, but must be of a real floating-point type")
        if self.packed is not None:
            y = self.packed(x, self.part)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        weight = self.dequantize() if self.dense is None else self.dense
        return nn.functional.linear(
            x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        )

    def __getattr__(self, name: str) -> Any:
        # Models read a layer's weight, most of them for its dtype.
        if name != "weight":
            return super().__getattr__(name)
        if self.dense is not None:
            return self.dense
        with torch.inference_mode():  # torch refuses to change what it returns: the change would be lost
            return self.dequantize()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination.update({prefix + name: tensor for name, tensor in self.stored().items()})

    def _load_from_state_dict(self, *arguments: Any) -> None:
        on_host = self._is_laid_out_for_the_host()
        if self.packed is not None and not on_host:
            prefix, errors = arguments[1], arguments[-1]
            errors.append(f"{prefix[:-1]} uses packed kernels and cannot load weights; call keep_dense first")
            return
        if on_host:
            self.keep_dense(False)
        super()._load_from_state_dict(*arguments)
        if on_host:
            self.use_kernels(PackedWeights(lay_out([self.matrix()], self.block_size)), 0)
        if self.dense is not None:
            self.dense = self.dequantize()

    def extra_repr(self) -> str:
        """Describe the module for ``print``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"block_size={self.block_size}, bias={self.bias is not None}, "
            f"permuted={self.permuted}, symmetric={self.symmetric}, "
            f"dense={self.dense is not None}, kernels={self.packed is not None}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # View the tensors as integers meanwhile: conversion to another dtype skips those, a move does not.
        kept = {name: getattr(self, name) for name in PACKED}
        kept = {name: tensor for name, tensor in kept.items() if tensor is not None}
        for name, tensor in kept.items():
            setattr(self, name, tensor.view(_BITS[tensor.element_size()]))
        try:
            super()._apply(fn, recurse)
        finally:
            for name, tensor in kept.items():
                setattr(self, name, getattr(self, name).view(tensor.dtype))
        if self._is_laid_out_for_the_host() and self.device.type != "cpu":
            self.keep_dense(True)  # no other device has a kernel for this layout
        return self

    def _is_laid_out_for_the_host(self) -> bool:
        return self.packed is not None and self.packed.kind is HostTensors
