"""Packed weights as the CPU's kernel reads them, and the product; see `harness.cpu.product`.

Trits take the bytes that they have in a checkpoint, five in each, but a byte never holds trits of two blocks,
and the bytes of all rows follow each other, piece of columns by piece: 1.625 bits a trit in blocks of 64 or
128 columns. alpha and mu stay as they are stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from harness.cpu.lanes import LANES
from harness.cpu.product import Weights, cut, multiply
from harness.cpu.threads import share
from harness.ternary.format import pack_base3, unpack_base3
from harness.ternary.kernels.tensors import Matrix, numbers

# Fewer weights times tokens are not worth waking another thread for, which takes about 0.1 ms.
SHARED_WORK = 2**21
# Tokens whose sums are kept at once: those of all rows should stay in a cache.
TOKENS = 16 * LANES


class HostTensors(NamedTuple):
    """The layout of one matrix, or of several matrices (parts) that multiply the same x.

    Attributes
    ----------
    words : uint8 tensor
        Bytes of trits: for every piece of columns (`harness.cpu.product.cut`) and every row; and eight more.
    grid : (blocks, n) int32 or int16 tensor
        Pairs (alpha, mu), in float16 or as int8 codes.
    permutation : (m,) int32 tensor
        Original column of every trit, the same in all parts. Empty for the identity.
    row_factors : (n,) int16 tensor, or None
        For int8 codes: row factors, float16.
    block_factors : (parts, blocks) int32 tensor, or None
        For int8 codes: block factors of alpha and mu, pairs of float16.
    ends : list of int
        End row of every part.
    block_size, columns : int
        Columns per block, and m.
    in_float16 : bool
        Of no use here.
    """

    words: torch.Tensor
    grid: torch.Tensor
    permutation: torch.Tensor
    row_factors: torch.Tensor | None
    block_factors: torch.Tensor | None
    ends: list[int]
    block_size: int
    columns: int
    in_float16: bool = False

    def part(self, index: int) -> Matrix:
        """Unpack one of the matrices, bit for bit as it was stored."""
        begin, end = [0, *self.ends][index : index + 2]
        pieces, rows = cut(self.columns, self.block_size), self.ends[-1]
        groups = torch.from_numpy(-(-pieces.width // 5)).tolist()
        trits = [
            unpack_base3(part.view(rows, -1)[begin:end], width)
            for part, width in zip(
                self.words[:-8].split([rows * count for count in groups]), pieces.width.tolist(), strict=True
            )
        ]
        scale, shift = (value.T.contiguous() for value in numbers(self.grid[:, begin:end]).unbind(-1))
        order = self.permutation
        if not len(order):
            order = torch.arange(self.columns, device=order.device)
        found = Matrix(torch.cat(trits, dim=1), scale, shift, order)
        if self.row_factors is None or self.block_factors is None:
            return found
        factors = numbers(self.block_factors[index])
        return found._replace(
            row_factor=self.row_factors[begin:end].view(torch.float16),
            scale_factor=factors[:, 0].contiguous(),
            shift_factor=factors[:, 1].contiguous(),
        )


def lay_out(matrices: list[Matrix], block_size: int) -> HostTensors:
    """Lay out matrices with equal columns and permutations, and the same kind of grid."""
    order = matrices[0].permutation
    identity = torch.equal(order.long(), torch.arange(len(order), device=order.device))
    pieces = cut(len(order), block_size)
    words = [
        pack_base3(torch.cat([matrix.trits[:, first : first + width] for matrix in matrices])).flatten()
        for first, width in zip(pieces.first.tolist(), pieces.width.tolist(), strict=True)
    ]
    grids = torch.cat([torch.stack([matrix.scale, matrix.shift], -1) for matrix in matrices])
    rows: list[torch.Tensor] = []
    blocks: list[torch.Tensor] = []
    for *_, row, scale, shift in matrices:
        if row is not None and scale is not None and shift is not None:
            rows.append(row)
            blocks.append(torch.stack([scale, shift], -1))
    pair = torch.int16 if grids.dtype == torch.int8 else torch.int32
    return HostTensors(
        torch.cat([*words, words[0].new_zeros(8)]),
        grids.transpose(0, 1).contiguous().view(pair)[..., 0],
        order.new_empty(0, dtype=torch.int32) if identity else order.int(),
        torch.cat(rows).view(torch.int16) if rows else None,
        torch.stack(blocks).view(torch.int32)[..., 0] if blocks else None,
        np.cumsum([len(matrix.trits) for matrix in matrices]).tolist(),
        block_size,
        len(order),
    )


def multiply_on_host(x: torch.Tensor, packed: HostTensors) -> torch.Tensor:
    """Compute ``x @ W_hat.T``, (tokens, n) in the dtype of x, with float32 sums."""
    if x.shape[1] != packed.columns:
        raise ValueError(f"x has shape {tuple(x.shape)}, but the weights have {packed.columns} columns")
    x = x.detach()
    if 0 < len(x) <= TOKENS:
        return _multiply_some(x, packed).to(x.dtype)
    y = x.new_empty(len(x), packed.ends[-1])
    for begin in range(0, len(x), TOKENS):
        y[begin : begin + TOKENS] = _multiply_some(x[begin : begin + TOKENS], packed)
    return y


def _multiply_some(x: torch.Tensor, packed: HostTensors) -> torch.Tensor:
    """Multiply tokens whose sums fit in a cache; (tokens, n) float32."""
    tokens, rows = len(x), packed.ends[-1]
    x = x.float()
    if len(packed.permutation):
        x = x[:, packed.permutation]
    if tokens > 1:
        x = pad(x, (0, 0, 0, -tokens % LANES)).view(-1, LANES, packed.columns).transpose(1, 2)
    bundles = x.contiguous().numpy()
    products = np.empty((len(bundles), rows, *bundles.shape[2:]), np.float32)
    weights = _weights_of(packed)

    def rows_of_all(begin: int, end: int) -> None:
        multiply(bundles, weights, products, begin, end)

    def all_rows_of(begin: int, end: int) -> None:
        multiply(bundles[begin:end], weights, products[begin:end], 0, rows)

    threads = min(torch.get_num_threads(), max(1, tokens * rows * packed.columns // SHARED_WORK))
    if len(bundles) < 2 * threads:
        share(rows_of_all, rows, threads)
    else:  # which makes the tables of a bundle once
        share(all_rows_of, len(bundles), threads)
    y = torch.from_numpy(products)
    return y.transpose(1, 2).reshape(-1, rows)[:tokens] if tokens > 1 else y


# The arrays of a layout by its words: to make them takes longer than the product of a small matrix.
_weights = WeakTensorKeyDictionary()


def _weights_of(packed: HostTensors) -> Weights:
    places = tuple(None if tensor is None else tensor.data_ptr() for tensor in packed[:5])
    known, weights = _weights.get(packed.words, (None, None))
    if known != places:
        weights = _as_arrays(packed)
        _weights[packed.words] = places, weights
    return weights


def _as_arrays(packed: HostTensors) -> Weights:
    """View tensors as arrays, without a reference to the tensors: it would keep the cache's entry alive."""

    def array(tensor: torch.Tensor | None, kind: str, shape: tuple[int, ...]) -> Any:
        if tensor is None:
            return np.empty([0 if size == -1 else size for size in shape], kind)
        return tensor.detach().contiguous().numpy().view(kind).reshape(shape)

    blocks, rows = packed.grid.shape
    return Weights(
        array(packed.words, "uint8", (-1,)),
        array(packed.grid, "int8" if packed.grid.dtype == torch.int16 else "uint16", (blocks, rows, 2)),
        array(packed.row_factors, "uint16", (-1,)),
        array(packed.block_factors, "uint16", (-1, blocks, 2)),
        np.array(packed.ends),
        cut(packed.columns, packed.block_size),
    )
