"""Embedding and head in 8 bits: codes with a factor for every row, on disk; dense in memory.

A row of the matrix is ``row_factor * codes``, computed in float32 and rounded to the model's dtype. A
quantization run rounds them before it calibrates, so that calibration sees what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.errors import UserError
from reference.types import CODE_LIMIT


def encode(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is stored: ``weight`` (rows, columns) int8, the codes, and ``row_factor`` (rows,) float32.

    The largest weight of every row has the largest code.
    """
    rows = weight.float()
    factor = torch.linalg.vector_norm(rows, torch.inf, dim=1) / CODE_LIMIT
    return {"weight": _codes(rows, factor).to(torch.int8), "row_factor": factor}


def _codes(rows: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return torch.div(rows, torch.where(factor == 0, 1, factor)[:, None]).round_()


def decode(weight: torch.Tensor, row_factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight (rows, columns) of what `encode` gave."""
    return (row_factor[:, None] * weight).to(dtype)


@dataclass(frozen=True)
class CodedMatrix:
    """An embedding or a head in 8 bits; `original` is its weight before."""

    module: Any
    parts: dict[str, torch.Tensor]
    original: torch.Tensor

    @property
    def saved_bytes(self) -> int:
        """How much less is stored."""
        return self.original.nbytes - sum(tensor.nbytes for tensor in self.parts.values())


def round_embeddings(model: Any) -> dict[str, CodedMatrix]:
    """Round a model's embedding, and its head if that is another matrix, to 8 bits.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its weights are replaced by those that will be read back.

    Returns
    -------
    dict of str to CodedMatrix
        By the names of the modules.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = [embedding]
    if head is not None and head.weight is not embedding.weight:
        found.append(head)
    names = {id(module): name for name, module in model.named_modules()}
    coded = {}
    for module in found:
        matrix = CodedMatrix(module, encode(module.weight.data), module.weight.data)
        module.weight.data = decode(**matrix.parts, dtype=module.weight.dtype)
        coded[names[id(module)]] = matrix
    return coded


@contextmanager
def unrounded(coded: dict[str, CodedMatrix]) -> Iterator[None]:
    """Put the original weights back for a while."""
    rounded = {name: matrix.module.weight.data for name, matrix in coded.items()}
    for matrix in coded.values():
        matrix.module.weight.data = matrix.original
    try:
        yield
    finally:
        for name, matrix in coded.items():
            matrix.module.weight.data = rounded[name]


def expect_codes(module: Any) -> None:
    """Let a module be loaded that has codes in the place of its weight.

    Raises
    ------
    UserError
        If it has no matrix of weights.
    """
    if getattr(module, "weight", None) is None or module.weight.ndim != 2:
        raise UserError(f"config.json: coded names a {type(module).__name__}, which has no matrix to code")
    with torch.device(module.weight.device):
        module.register_buffer("row_factor", torch.zeros(len(module.weight), dtype=torch.float32))


def take_codes(module: Any, stored: torch.dtype, dtype: torch.dtype) -> None:
    """Put the weight that the loaded codes stand for in their place; factors are kept for `kept_codes`.

    `stored` is what calibration saw it in, `dtype` what the model is loaded in.
    """
    codes, factor = module.weight.data, module.row_factor
    del module.row_factor
    # Its bits, as what converts a model's floating-point tensors must leave it alone.
    module.register_buffer("row_factor_bits", factor.view(torch.int32), persistent=False)
    weight = decode(codes, factor, stored).to(dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)


def kept_codes(module: Any) -> dict[str, torch.Tensor]:
    """What is stored of a module: what `take_codes` was given, but for rows that have changed or are new.

    Those, and a module that has taken the place of the loaded one, are as `encode` makes them.
    """
    weight = module.weight.data
    parts = encode(weight)
    if not hasattr(module, "row_factor_bits"):
        return parts
    factor = module.row_factor_bits.view(torch.float32)[: len(weight)]
    rows = weight[: len(factor)].float()
    codes = _codes(rows, factor)
    # A weight is off its code by the rounding to bfloat16 at the most, less than half a step: so codes are
    # found again, and a row of other weights is seen.
    on_grid = (rows - factor[:, None] * codes).abs() <= 2**-8 * rows.abs()
    same = (on_grid & (codes.abs() <= CODE_LIMIT)).all(1).nonzero()[:, 0]
    parts["weight"][same] = codes[same].to(torch.int8)
    parts["row_factor"][same] = factor[same]
    return parts
