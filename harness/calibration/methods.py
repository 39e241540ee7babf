"""Methods that quantize a matrix: PT²-LLM by a backend, or one of the 2-bit baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from harness.backends import Backend
from harness.calibration.targets import Shift
from harness.compute import Compute
from harness.errors import UserError
from reference import baselines
from reference.types import TernaryConfig, TernaryMatrix

# Maps weights (n, m), in the layer's dtype, and the float64 Gram matrix (m, m) of their inputs, both on the
# device that computes, to the quantized matrix: a TernaryMatrix, or for the baselines a dense (n, m) array.
# Result arrays may come from any library that supports DLPack.
Method = Callable[[torch.Tensor, torch.Tensor], Any]


def ternarizer(backend: Backend, compute: Compute, config: TernaryConfig) -> Method:
    """Return the method that fits PT²-LLM by a backend."""
    precision = getattr(torch, backend.precision)

    def method(W: torch.Tensor, C: torch.Tensor) -> TernaryMatrix:
        with compute.queue(backend):
            return backend.ternarize(W.to(precision), C, config)

    return method


def target_shift(backend: Backend, compute: Compute, damping: float, strength: float) -> Shift:
    """Return the shift of weights towards their targets, by a backend."""
    precision = getattr(torch, backend.precision)

    def shift(W: torch.Tensor, C: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
        with compute.queue(backend):
            arguments = (backend.to_device(array) for array in (W.to(precision), C, D))
            shifted = backend.function("targets.shift_targets")(
                *arguments, damping=damping, strength=strength
            )
            return torch.from_dlpack(shifted)

    return shift


RTN = "rtn-2bit"
BASELINES = {
    RTN: "round to nearest on a min-max grid",
    "gptq-2bit": "GPTQ as its paper has it: min-max grid, columns in their order",
    "gptq-2bit-best": "GPTQ at its best: activation order, MSE-clipped grid",
}


def two_bits(shapes: Iterable[tuple[int, int]], group: int, shared: int = 16 + 2) -> float:
    """Bits per weight of matrices in 2 bits and groups of columns, the last of which may be short.

    Parameters
    ----------
    shapes : iterable of (n, m)
        Rows and columns of the matrices.
    group : int
        Columns of a row that share a step and a zero point.
    shared : int
        Bits of these two.
    """
    sizes = [(n * m, n * math.ceil(m / group)) for n, m in shapes]
    return 2 + shared * sum(groups for _, groups in sizes) / sum(weights for weights, _ in sizes)


def baseline(name: str, config: TernaryConfig) -> Method:
    """Return a method of `BASELINES`, with groups of the block size; it returns dense arrays."""

    def method(weight: torch.Tensor, products: torch.Tensor) -> np.ndarray:
        W, C = (tensor.double().cpu().numpy() for tensor in (weight, products))
        if name == RTN:
            return baselines.round_to_nearest(W, group_size=config.block_size)
        best = name == "gptq-2bit-best"
        return baselines.gptq(
            W,
            C,
            group_size=config.block_size,
            damping=config.damping,
            activation_order=best,
            clip=best,
        )

    return method


class FitError(UserError):
    """The method cannot quantize a matrix."""
