"""What exports to other formats share: what they may hold, what they lose, how they are written.

A block of a row is alpha * t + mu = alpha * q + (mu - alpha) with q = t + 1 in {0, 1, 2}: an affine grid
of two bits, which other formats hold if their offset is a float and their groups are neighbouring
columns. They store the offset, or what takes its place, in float16; alpha is in float16 already.
That one rounding is all an export changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from harness.errors import UserError
from harness.hf import load
from harness.ternary.format import unpack_base3
from harness.ternary.linear import TernaryLinear
from harness.ternary.reading import load_tokenizer
from reference.types import TernaryMatrix

Float64 = NDArray[np.float64]


@dataclass
class Rounding:
    """How far weights were moved, in shares of the |alpha| of their block.

    All weights of a block are moved by the same amount. Blocks with alpha = 0 are constant, are held
    exactly by every format and do not count.

    Attributes
    ----------
    blocks : int
        Blocks counted.
    total, largest : float
        The sum of the shares, and the largest.
    ratio : float
        abs(mu / alpha) of the block with the largest.
    used : float
        The most that a block was moved, in halves of float16's unit in the last place: rounding
        gives at most 1.
    """

    blocks: int = 0
    total: float = 0.0
    largest: float = 0.0
    ratio: float = 0.0
    used: float = 0.0

    def add(self, moved: Float64, allowed: Float64, alpha: Float64, mu: Float64) -> None:
        """Count blocks, given how far each was moved and half a unit in the last place there."""
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
        """The mean share."""
        return self.total / self.blocks if self.blocks else 0.0


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes
    ----------
    path : Path
        The file or folder.
    size : int
        Bytes of its weights and everything beside them.
    weights : int
        Ternary weights in it.
    weight_bytes : int
        Bytes they take, with their scales and offsets.
    rounding : Rounding
        What was lost.
    """

    path: Path
    size: int
    weights: int
    weight_bytes: int
    rounding: Rounding

    def summary(self, rounded: str) -> str:
        """What the command line prints; `rounded` names what was rounded to float16."""
        rounding = self.rounding
        return (
            f"{self.path}: {self.size / 1e6:.1f} MB; "
            f"ternary weights take {8 * self.weight_bytes / self.weights:.3f} bits each\n"
            f"rounding {rounded} to float16 moved weights by {rounding.mean:.2g} of their alpha in the mean "
            f"of {rounding.blocks} blocks,\n"
            f"by {rounding.largest:.2g} at most, in a block with mu = {rounding.ratio:.3g} alpha: "
            f"{rounding.used:.2f} of half a unit in the last place at most.\n"
            "Nothing else changed"
        )


@dataclass(frozen=True)
class Stored:
    """A checkpoint whose columns are in their original order.

    Attributes
    ----------
    folder : Path
        Where it is.
    model : transformers.PreTrainedModel
        What it is read into; its config is the original model's.
    tokenizer : transformers.PreTrainedTokenizerBase
        The one that was saved with it.
    layers : dict of str to TernaryLinear
        Its ternary layers.
    tensors : dict of str to torch.Tensor
        What is stored as it was; of tied tensors, one.
    """

    folder: Path
    model: Any
    tokenizer: Any
    layers: dict[str, TernaryLinear]
    tensors: dict[str, torch.Tensor]

    @property
    def config(self) -> Any:
        """The original model's settings."""
        return self.model.config

    def matrix(self, name: str) -> TernaryMatrix:
        """The weights of one ternary layer."""
        layer = self.layers[name]
        trits = unpack_base3(layer.trits, layer.in_features).to(torch.int8).numpy()
        scale, shift = layer.scale.numpy(), layer.shift.numpy()
        return TernaryMatrix(trits, scale, shift, np.arange(layer.in_features), layer.block_size)


def read_unpermuted(folder: Path, trust_remote_code: bool = False) -> Stored:
    """Read a checkpoint that has float16 grids and was not reordered.

    Parameters
    ----------
    folder : Path
        What `python -m harness.quantize --reorder none` wrote.
    trust_remote_code : bool
        Whether code that comes with the model may run.

    Returns
    -------
    Stored

    Raises
    ------
    UserError
        As `harness.load` does; or if columns were reordered, alpha and mu are in 8 bits, or there is no
        tokenizer.
    """
    model = load(folder, dense=False, trust_remote_code=trust_remote_code)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, TernaryLinear)}
    reordered = [name for name, layer in layers.items() if layer.permutation is not None]
    if reordered:
        raise UserError(
            f"{folder} cannot be exported: {len(reordered)} of its {len(layers)} matrices were "
            f"reordered ({reordered[0]} is one). A reordered block has columns from all over the row, and "
            "this format's groups are neighbouring columns; quantize with --reorder none"
        )
    if model.config.quantization_config.coded:
        raise UserError(
            f"{folder} cannot be exported: its embedding is in 8 bits with factors of rows; "
            "quantize with --embedding as-it-is"
        )
    if any(layer.row_factor is not None for layer in layers.values()):
        raise UserError(
            f"{folder} cannot be exported: its alpha and mu are in 8 bits with factors, and this format "
            "would round alpha, too; quantize with --grid float16"
        )
    ternary = {f"{name}.{buffer}" for name, layer in layers.items() for buffer, _ in layer.named_buffers()}
    left_out = ternary | getattr(model, "all_tied_weights_keys", {}).keys()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return Stored(folder, model, load_tokenizer(folder, trust_remote_code), layers, tensors)


def half_unit(values: Float64) -> Float64:
    """Half a unit in the last place of float16 at these values: the most that rounding moves them."""
    _, exponent = np.frexp(values)
    # Below 2^-14 float16 has no finer unit.
    return np.ldexp(1.0, np.maximum(exponent - 1, -14) - 11)


def require_outside(folder: Path, out: Path) -> None:
    """Refuse to write into the checkpoint that is read."""
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{out} is inside the checkpoint {folder}, which is read; choose another --out")


@contextmanager
def progress(total: int) -> Iterator[Any]:
    """A bar over tensors."""
    with tqdm(total=total, desc="export", unit="tensor", disable=None, leave=False) as bar:
        yield bar
