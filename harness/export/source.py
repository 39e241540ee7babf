"""Shared by all exports: reading the checkpoint, measuring the rounding error, reporting the result.

A block of a row is alpha * t + mu = alpha * q + (mu - alpha) with q = t + 1 in {0, 1, 2}: an affine 2-bit
grid. Formats with a float offset and groups of neighbouring columns can store it. They store the offset,
or an equivalent zero point, in float16; alpha already is float16. This rounding is the only change.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from harness.errors import UserError
from harness.export.fold import fold
from harness.hf import load_stored
from harness.models.tokenizer import load_tokenizer
from harness.runtimes.features import refusals_of
from harness.ternary.format import unpack_base3
from harness.ternary.linear import TernaryLinear
from harness.ternary.notice import drop_notice
from reference.types import TernaryMatrix

Float64 = NDArray[np.float64]

AS_IT_IS = "as-it-is"  # embedding and head in their own dtype


@dataclass
class Rounding:
    """Rounding error of an export, relative to the |alpha| of each block.

    Rounding moves all weights of a block by the same amount. Blocks with alpha = 0 are constant; every
    format stores them exactly, so they are not counted.

    Attributes
    ----------
    blocks : int
        Number of blocks counted.
    total, largest : float
        Sum and maximum of the relative errors.
    ratio : float
        abs(mu / alpha) of the block with the largest error.
    used : float
        Largest absolute error, in half units in the last place of float16; rounding gives at most 1.
    """

    blocks: int = 0
    total: float = 0.0
    largest: float = 0.0
    ratio: float = 0.0
    used: float = 0.0

    def add(self, moved: Float64, allowed: Float64, alpha: Float64, mu: Float64) -> None:
        """Add blocks.

        Parameters
        ----------
        moved : (blocks,) float64 array
            How far the weights of each block were moved.
        allowed : (blocks,) float64 array
            Half a unit in the last place of each rounded value, in the scale of the weights.
        alpha, mu : (blocks,) float64 array
            Grids of the blocks.
        """
        if not moved.size:
            return
        shares = moved / np.abs(alpha)
        worst = int(shares.argmax())
        self.blocks += shares.size
        self.total += float(shares.sum())
        self.used = max(self.used, float((moved / allowed).max()))
        if shares[worst] > self.largest:
            self.largest, self.ratio = float(shares[worst]), float(abs(mu[worst] / alpha[worst]))

    @property
    def mean(self) -> float:
        """Mean relative error."""
        return self.total / self.blocks if self.blocks else 0.0


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes
    ----------
    path : Path
        The file or folder written.
    size : int
        Total bytes.
    weights : int
        Number of ternary weights.
    weight_bytes : int
        Bytes of the ternary weights, including scales and offsets.
    rounding : Rounding
        Rounding error.
    notes : tuple of str
        What was chosen, and what else is different.
    """

    path: Path
    size: int
    weights: int
    weight_bytes: int
    rounding: Rounding
    notes: tuple[str, ...] = ()

    def summary(self, rounded: str) -> str:
        """Summarize for people; `rounded` names the value that was rounded to float16."""
        rounding = self.rounding
        lines = [
            f"wrote {self.path}: {self.size / 1e6:.1f} MB, "
            f"{8 * self.weight_bytes / self.weights:.3f} bits per ternary weight",
            *self.notes,
        ]
        if rounding.largest:
            lines += [
                f"rounding {rounded} to float16 moved weights by {rounding.mean:.2g} alpha on average over "
                f"{rounding.blocks} blocks,",
                f"by at most {rounding.largest:.2g} alpha, in a block with |mu| = {rounding.ratio:.3g} "
                f"alpha; the largest error is {rounding.used:.2f} of half a unit in the last place",
            ]
        else:
            lines.append("every ternary weight is exact")
        return "\n".join(lines)


@dataclass(frozen=True)
class Stored:
    """A checkpoint whose columns are in the order of the model's inputs, or of reordered rows before them.

    Attributes
    ----------
    folder : Path
        Folder of the checkpoint.
    model : transformers.PreTrainedModel
        The loaded model; its config is the original model's.
    tokenizer : transformers.PreTrainedTokenizerBase
        The tokenizer saved with the checkpoint.
    layers : dict of str to TernaryLinear
        The ternary layers.
    tensors : dict of str to torch.Tensor
        Unquantized tensors, in the order of `rows`; tied tensors appear once.
    rows : dict of str to (n,) intp array
        Ternary layers whose rows are reordered, as `fold` finds them.
    """

    folder: Path
    model: Any
    tokenizer: Any
    layers: dict[str, TernaryLinear]
    tensors: dict[str, torch.Tensor]
    rows: dict[str, NDArray[np.intp]]

    @property
    def config(self) -> Any:
        """Config of the original model."""
        return self.model.config

    def symmetric(self, name: str) -> bool:
        """Whether mu is 0 in a whole ternary layer."""
        shift = self.layers[name].stored().get("shift")
        return shift is None or not shift.any()

    def matrix(self, name: str) -> TernaryMatrix:
        """Return the weights of a ternary layer, in the order of its inputs and of `rows`."""
        layer = self.layers[name]
        trits = unpack_base3(layer.trits, layer.in_features).to(torch.int8).numpy()
        scale = layer.scale.numpy()
        shift = np.zeros_like(scale) if layer.shift is None else layer.shift.numpy()
        if (rows := self.rows.get(name)) is not None:
            trits, scale, shift = trits[rows], scale[rows], shift[rows]
        return TernaryMatrix(trits, scale, shift, np.arange(layer.in_features), layer.block_size)


def read_exportable(folder: Path, trust_remote_code: bool = False) -> Stored:
    """Read a checkpoint that can be exported: float16 grids, orders that fold away, unquantized embeddings.

    Parameters
    ----------
    folder : Path
        Checkpoint written by ``python -m harness.quantize --grid float16``.
    trust_remote_code : bool
        Whether Python code shipped with the model may run.

    Returns
    -------
    Stored

    Raises
    ------
    UserError
        As for `harness.load`; also if columns have an order that does not fold away, if alpha and mu or the
        embedding are in 8 bits, or if there is no tokenizer.
    """
    model = load_stored(folder, trust_remote_code=trust_remote_code)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, TernaryLinear)}
    with refusals_of(folder):
        rows = fold(layers, model.config)
    if model.config.quantization_config.coded:
        raise UserError(
            f"{folder} cannot be exported: its embedding is stored in 8 bits with row factors; "
            "quantize with --embedding as-it-is"
        )
    if any(layer.row_factor is not None for layer in layers.values()):
        raise UserError(
            f"{folder} cannot be exported: its alpha and mu are stored in 8 bits with factors, and this "
            "format would round alpha as well; quantize with --grid float16, or with --for"
        )
    ternary = {f"{name}.{buffer}" for name, layer in layers.items() for buffer, _ in layer.named_buffers()}
    left_out = ternary | getattr(model, "all_tied_weights_keys", {}).keys()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    for name, order in rows.items():
        if f"{name}.bias" in tensors:
            tensors[f"{name}.bias"] = tensors[f"{name}.bias"][torch.from_numpy(order)]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    drop_notice(model.config)
    return Stored(folder, model, load_tokenizer(folder, trust_remote_code), layers, tensors, rows)


def half_unit(values: Float64) -> Float64:
    """Half a unit in the last place of float16 at each value: the largest possible rounding error."""
    _, exponent = np.frexp(values)
    # Below 2^-14, float16 is subnormal: the unit stays the same.
    return np.ldexp(1.0, np.maximum(exponent - 1, -14) - 11)


def rounded_offset(matrix: TernaryMatrix, name: str, where: str, rounding: Rounding) -> NDArray[np.float16]:
    """Round mu - alpha of every block to float16, and add the errors to `rounding`."""
    alpha, mu = matrix.scale.astype(np.float64), matrix.shift.astype(np.float64)
    exact = mu - alpha
    with np.errstate(over="ignore"):
        offset = exact.astype(np.float16)
    if not np.isfinite(offset).all():
        raise UserError(f"{name}: mu - alpha of a block overflows float16, {where}")
    varied = alpha != 0
    moved = np.abs(offset - exact)[varied]
    rounding.add(moved, half_unit(exact[varied]), alpha[varied], mu[varied])
    return offset


def require_outside(folder: Path, out: Path) -> None:
    """Refuse to write into the checkpoint being exported."""
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{out} is inside the checkpoint {folder} that is exported; choose another --out")
