"""Ternary weights in the layout of the packed kernels, as torch tensors.

The layout is that of `reference.layout`. Every tensor holds its bits as signed integers: torch has
few operations on unsigned integers, and converting a model's dtype must not touch alpha and mu. One
integer holds a pair (alpha, mu).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from reference.layout import CHUNK, TILE_ROWS, WORD

# dtype of the numbers in a pair, by the dtype of the integer that holds the pair; and the other way round.
PAIRS = {"int16": "int8", "int32": "float16"}
_OF_PAIRS = {number: pair for pair, number in PAIRS.items()}
# dtypes of the integers that hold a single number.
_OF_NUMBERS = {"uint32": "int32", "uint16": "int16", "float16": "int16"}


class Matrix(NamedTuple):
    """A ternary matrix as stored in a checkpoint, but with unpacked trits, (n, m) int8.

    alpha and mu are float16, or int8 with factors; without a shift mu is 0. The columns of the trits are in
    quantization order.
    """

    trits: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor | None
    permutation: torch.Tensor
    row_factor: torch.Tensor | None = None
    scale_factor: torch.Tensor | None = None
    shift_factor: torch.Tensor | None = None

    def dequantize(self, block_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Compute the (n, m) weights in float32, columns in original order, and round them to `dtype`."""
        block = torch.arange(self.trits.shape[1], device=self.trits.device) // block_size
        alpha, mu = self.grid()
        ordered = (alpha[:, block] * self.trits + mu[:, block]).to(dtype)
        weight = torch.empty_like(ordered)
        weight[:, self.permutation.long()] = ordered
        return weight

    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute alpha and mu of every block, (n, blocks) float32."""
        alpha = self.scale.float()
        mu = torch.zeros_like(alpha) if self.shift is None else self.shift.float()
        if self.row_factor is None or self.scale_factor is None:
            return alpha, mu
        row = self.row_factor.float()[:, None]
        if self.shift_factor is not None:
            mu = row * self.shift_factor.float() * mu
        return row * self.scale_factor.float() * alpha, mu


class PackedTensors(NamedTuple):
    """The layout of `reference.layout` of one matrix, or of several (parts) that multiply the same x.

    Attributes
    ----------
    words : (tiles, chunks, 32, 16) int32
        Trits.
    grid : (tiles, chunks, 32, pairs) int32 or int16
        Pairs (alpha, mu), in float16 or as int8 codes.
    permutation : (parts, 256 chunks) int16, or int32 beyond 65536 columns
        Original column of every trit.
    row_factors : (32 tiles,) int16, or None
        For int8 codes: row factors, float16.
    block_factors : (parts, chunks, pairs) int32, or None
        For int8 codes: block factors of alpha and mu, pairs of float16.
    ends : list of int
        End row of every part.
    block_size, columns : int
        Columns per block, and m.
    in_float16 : bool
        Whether all weights are within the range of float16.
    """

    words: torch.Tensor
    grid: torch.Tensor
    permutation: torch.Tensor
    row_factors: torch.Tensor | None
    block_factors: torch.Tensor | None
    ends: list[int]
    block_size: int
    columns: int
    in_float16: bool

    def part(self, index: int) -> Matrix:
        """Unpack one of the matrices, bit for bit as it was stored."""
        begins = [0, *self.ends]
        rows = begins[index + 1] - begins[index]
        first = sum(
            -(-(end - begin) // TILE_ROWS) for begin, end in zip(begins, self.ends[:index], strict=False)
        )
        tiles = slice(first, first - (-rows // TILE_ROWS))
        in_rows = slice(TILE_ROWS * tiles.start, TILE_ROWS * tiles.stop)

        words = self.words[tiles]
        # Four lanes of a warp share a row of a chunk; their words are interleaved.
        ordered = (
            words.view(*words.shape[:3], 4, 4)
            .permute(0, 2, 1, 4, 3)
            .reshape(words.shape[0] * TILE_ROWS, -1, 1)
        )
        digits = ordered >> torch.arange(0, 2 * WORD, 2, device=words.device) & 3
        trits = (digits.flatten(1)[:rows, : self.columns] - 1).to(torch.int8)

        pairs = self._of_blocks(numbers(self.grid[tiles].transpose(1, 2).flatten(0, 1).flatten(1)))
        scale, shift = (value.contiguous() for value in pairs[:rows].unbind(-1))
        permutation = self.permutation[index, : self.columns].to(torch.int32)
        if self.columns <= 2**16:
            permutation &= 0xFFFF
        if self.row_factors is None or self.block_factors is None:
            return Matrix(trits, scale, shift, permutation)
        row_factor = self.row_factors[in_rows][:rows].view(torch.float16)
        factors = self._of_blocks(numbers(self.block_factors[index].flatten())[None])[0]
        return Matrix(
            trits, scale, shift, permutation, row_factor, *(f.contiguous() for f in factors.unbind(-1))
        )

    def _of_blocks(self, pairs: torch.Tensor) -> torch.Tensor:
        """Select the pairs of blocks, (rows, blocks, 2), from those of chunks."""
        blocks = -(-self.columns // self.block_size)
        return pairs[:, :: max(1, self.block_size // CHUNK)][:, :blocks]


def of_layout(layout: Any) -> PackedTensors:
    """The tensors of a `reference.layout.Layout`, of any backend's arrays."""

    def tensor(name: str) -> Any:
        array = getattr(layout, name)
        if array is None:
            return None
        paired = name in ("grid", "block_factors")
        bits = torch.from_dlpack(array.view((_OF_PAIRS if paired else _OF_NUMBERS)[array.dtype.name]))
        return bits.squeeze(-1) if paired else bits

    return PackedTensors(
        tensor("words"),
        tensor("grid"),
        tensor("permutation"),
        tensor("row_factors"),
        tensor("block_factors"),
        list(layout.ends),
        layout.block_size,
        layout.columns,
        layout.in_float16,
    )


def numbers(bits: Any) -> Any:
    """View a tensor of integers as the pairs of numbers (..., 2) that it holds."""
    kind = PAIRS[str(bits.dtype).removeprefix("torch.")]
    # A copy: torch calls a tensor contiguous if its last axis has one entry, but views none of a wide stride.
    bits = bits.clone(memory_format=torch.contiguous_format)
    return bits.view(getattr(torch, kind)).view(*bits.shape, 2)
