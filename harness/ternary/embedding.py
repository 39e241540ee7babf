"""Embedding and LM head in 8 bits: int8 codes and one factor per row on disk, dense in memory.

A row of the matrix is ``row_factor * codes``, computed in float32 and rounded to the model's dtype.
Quantization rounds embedding and head before it calibrates, so that calibration uses the stored values.
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
    """Encode a matrix: ``weight`` (rows, columns) int8 holds the codes, ``row_factor`` is (rows,) float32.

    The largest weight of each row gets the largest code.
    """
    rows = weight.float()
    factor = torch.linalg.vector_norm(rows, torch.inf, dim=1) / CODE_LIMIT
    return {"weight": _codes(rows, factor).to(torch.int8), "row_factor": factor}


def _codes(rows: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return torch.div(rows, torch.where(factor == 0, 1, factor)[:, None]).round_()


def decode(weight: torch.Tensor, row_factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Decode the output of `encode` to dense weights (rows, columns)."""
    return (row_factor[:, None] * weight).to(dtype)


@dataclass(frozen=True)
class CodedMatrix:
    """An embedding or LM head in 8 bits; `original` is its weight before rounding."""

    module: Any
    parts: dict[str, torch.Tensor]
    original: torch.Tensor

    @property
    def saved_bytes(self) -> int:
        """Bytes saved in the checkpoint."""
        return self.original.nbytes - sum(tensor.nbytes for tensor in self.parts.values())


def has_own_head(model: Any) -> bool:
    """Whether a model has an LM head with other weights than its embedding, whatever its config says."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and head.weight is not embedding.weight


def correct_config(model: Any) -> None:
    """Make the config of a model whose LM head is its own say so, or transformers may tie it."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False) and has_own_head(model):
            config.tie_word_embeddings = False


def round_embeddings(model: Any) -> dict[str, CodedMatrix]:
    """Round a model's embedding to 8 bits, and its LM head unless the two are tied.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place: its weights become those that the checkpoint will give back.

    Returns
    -------
    dict of str to CodedMatrix
        By module name.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = [embedding, head] if has_own_head(model) else [embedding]
    names = {id(module): name for name, module in model.named_modules()}
    coded = {}
    for module in found:
        matrix = CodedMatrix(module, encode(module.weight.data), module.weight.data)
        module.weight.data = decode(**matrix.parts, dtype=module.weight.dtype)
        coded[names[id(module)]] = matrix
    return coded


@contextmanager
def unrounded(coded: dict[str, CodedMatrix]) -> Iterator[None]:
    """Restore the original weights inside a ``with`` block."""
    rounded = {name: matrix.module.weight.data for name, matrix in coded.items()}
    for matrix in coded.values():
        matrix.module.weight.data = matrix.original
    try:
        yield
    finally:
        for name, matrix in coded.items():
            matrix.module.weight.data = rounded[name]


def expect_codes(module: Any) -> None:
    """Prepare a module for loading codes in place of its weight.

    Raises
    ------
    UserError
        If its weight is not a matrix.
    """
    if getattr(module, "weight", None) is None or module.weight.ndim != 2:
        raise UserError(
            f"config.json: `coded` lists a {type(module).__name__}, which has no weight matrix to decode"
        )
    with torch.device(module.weight.device):
        module.register_buffer("row_factor", torch.zeros(len(module.weight), dtype=torch.float32))


def take_codes(module: Any, stored: torch.dtype, dtype: torch.dtype) -> None:
    """Replace loaded codes with dense weights; keep the row factors for `kept_codes`.

    Parameters
    ----------
    module : nn.Module
        Holds codes in ``weight``, and ``row_factor``.
    stored : torch.dtype
        dtype of the weights during calibration.
    dtype : torch.dtype
        dtype that the model is loaded in.
    """
    codes, factor = module.weight.data, module.row_factor
    del module.row_factor
    # Kept as integers, so that converting the model to another dtype does not change it.
    module.register_buffer("row_factor_bits", factor.view(torch.int32), persistent=False)
    weight = decode(codes, factor, stored).to(dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)


def kept_codes(module: Any) -> dict[str, torch.Tensor]:
    """Return the codes to save: for unchanged rows, the loaded ones bit for bit.

    Rows that are new or have changed, and modules that were not loaded from codes, are encoded anew.
    """
    weight = module.weight.data
    parts = encode(weight)
    if not hasattr(module, "row_factor_bits"):
        return parts
    factor = module.row_factor_bits.view(torch.float32)[: len(weight)]
    rows = weight[: len(factor)].float()
    codes = _codes(rows, factor)
    # Rounding to bfloat16 moves a decoded weight by less than half a step: rounding recovers the codes of
    # an unchanged row, and a changed row is off the grid.
    on_grid = (rows - factor[:, None] * codes).abs() <= 2**-8 * rows.abs()
    same = (on_grid & (codes.abs() <= CODE_LIMIT)).all(1).nonzero()[:, 0]
    parts["weight"][same] = codes[same].to(torch.int8)
    parts["row_factor"][same] = factor[same]
    return parts
