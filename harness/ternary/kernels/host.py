"""Packed weights as the CPU's kernel reads them, and the product; see `harness.cpu.product`.

Trits take the bytes that they have in a checkpoint, five in each, but a byte never holds trits of two blocks,
and the bytes of all rows follow each other, piece of columns by piece: 1.625 bits a trit in blocks of 64 or
128 columns. alpha and mu stay as they are stored; where mu is 0, it takes no place here either.
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
from harness.ternary.kernels.tensors import Matrix

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
    grid : (blocks, n) int32, int16 or int8 tensor
        Pairs (alpha, mu), or alpha alone; in float16, or as int8 codes if there are factors.
    permutation : (m,) int32 tensor
        Original column of every trit, the same in all parts. Empty for the identity.
    row_factors : (n,) int16 tensor, or None
        For int8 codes: row factors, float16.
    block_factors : (parts, blocks) int32 or int16 tensor, or None
        For int8 codes: block factors of alpha and mu, pairs of float16, or of alpha alone.
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
        scale, shift = _two(_numbers(self.grid[:, begin:end].T, self.dtype))
        order = self.permutation
        if not len(order):
            order = torch.arange(self.columns, device=order.device)
        found = Matrix(torch.cat(trits, dim=1), scale, shift, order)
        if self.row_factors is None or self.block_factors is None:
            return found
        scale, shift = _two(_numbers(self.block_factors[index], torch.float16))
        row = self.row_factors[begin:end].view(torch.float16)
        return found._replace(row_factor=row, scale_factor=scale, shift_factor=shift)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers in `grid`."""
        return torch.float16 if self.row_factors is None else torch.int8


def _one_or_two(scale: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """Put what there is of alpha and mu side by side, on a new last axis."""
    return torch.stack([scale] if shift is None else [scale, shift], -1)


def _two(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Take apart what `_one_or_two` has put together."""
    scale, *shift = (value.contiguous() for value in numbers.unbind(-1))
    return scale, shift[0] if shift else None


def _bits(numbers: torch.Tensor) -> torch.Tensor:
    """View the one or two numbers on the last axis as one integer."""
    size = numbers.element_size() * numbers.shape[-1]
    return numbers.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[size])[..., 0]


def _numbers(bits: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """View integers as the numbers that they hold, the inverse of `_bits`."""
    # torch calls a tensor contiguous if its last axis has one entry, but views none of a wide stride.
    bits = bits.clone(memory_format=torch.contiguous_format)
    return bits.view(kind).view(*bits.shape, -1)


def lay_out(matrices: list[Matrix], block_size: int) -> HostTensors:
    """Lay out matrices with equal columns and permutations, and the same kind of grid."""
    order = matrices[0].permutation
    identity = torch.equal(order.long(), torch.arange(len(order), device=order.device))
    pieces = cut(len(order), block_size)
    words = [
        pack_base3(torch.cat([matrix.trits[:, first : first + width] for matrix in matrices])).flatten()
        for first, width in zip(pieces.first.tolist(), pieces.width.tolist(), strict=True)
    ]
    grids = torch.cat([_one_or_two(matrix.scale, matrix.shift) for matrix in matrices])
    rows: list[torch.Tensor] = []
    blocks: list[torch.Tensor] = []
    for *_, row, scale, shift in matrices:
        if row is not None and scale is not None:
            rows.append(row)
            blocks.append(_one_or_two(scale, shift))
    return HostTensors(
        torch.cat([*words, words[0].new_zeros(8)]),
        _bits(grids.transpose(0, 1)),
        order.new_empty(0, dtype=torch.int32) if identity else order.int(),
        torch.cat(rows).view(torch.int16) if rows else None,
        _bits(torch.stack(blocks)) if blocks else None,
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


def multiply_each(products: list[tuple[torch.Tensor, HostTensors]]) -> list[torch.Tensor]:
    """Compute several products as `multiply_on_host` does; threads share the small ones as wholes.

    Parameters
    ----------
    products : list of ((tokens, m) tensor, HostTensors)
        The factors of each, with the same number of columns.

    Returns
    -------
    list of (tokens, n) tensor
    """
    small = [0 < _work(x, packed) < 2 * SHARED_WORK and len(x) <= TOKENS for x, packed in products]
    jobs = [_job(*factors) if alone else None for factors, alone in zip(products, small, strict=True)]
    shared = [job for job in jobs if job is not None]

    def whole(begin: int, end: int) -> None:
        for job in shared[begin:end]:
            multiply(job.bundles, job.weights, job.products, 0, job.products.shape[1])

    work = sum(_work(*factors) for factors, alone in zip(products, small, strict=True) if alone)
    share(whole, len(shared), _threads(work))
    return [
        multiply_on_host(x, packed) if job is None else _product(job, len(x)).to(x.dtype)
        for (x, packed), job in zip(products, jobs, strict=True)
    ]


class _Job(NamedTuple):
    """A product as the kernel takes it: bundles of tokens, weights, and a place for the products."""

    bundles: Any
    weights: Weights
    products: Any


def _work(x: torch.Tensor, packed: HostTensors) -> int:
    """Weights times tokens."""
    return len(x) * packed.ends[-1] * packed.columns


def _threads(work: int) -> int:
    return min(torch.get_num_threads(), max(1, work // SHARED_WORK))


def _job(x: torch.Tensor, packed: HostTensors) -> _Job:
    tokens, x = len(x), x.detach().float()
    if len(packed.permutation):
        x = x[:, packed.permutation]
    if tokens > 1:
        x = pad(x, (0, 0, 0, -tokens % LANES)).view(-1, LANES, packed.columns).transpose(1, 2)
    bundles = x.contiguous().numpy()
    products = np.empty((len(bundles), packed.ends[-1], *bundles.shape[2:]), np.float32)
    return _Job(bundles, _weights_of(packed), products)


def _product(job: _Job, tokens: int) -> torch.Tensor:
    y = torch.from_numpy(job.products)
    # Of a single bundle the reshape is a view, with strides that nobody expects of a product.
    return y.transpose(1, 2).reshape(-1, y.shape[1])[:tokens].contiguous() if tokens > 1 else y


def _multiply_some(x: torch.Tensor, packed: HostTensors) -> torch.Tensor:
    """Multiply tokens whose sums fit in a cache; (tokens, n) float32."""
    rows, job = packed.ends[-1], _job(x, packed)
    bundles, weights, products = job

    def rows_of_all(begin: int, end: int) -> None:
        multiply(bundles, weights, products, begin, end)

    def all_rows_of(begin: int, end: int) -> None:
        multiply(bundles[begin:end], weights, products[begin:end], 0, rows)

    threads = _threads(_work(x, packed))
    if len(bundles) < 2 * threads:
        share(rows_of_all, rows, threads)
    else:  # which makes the tables of a bundle once
        share(all_rows_of, len(bundles), threads)
    return _product(job, len(x))


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
    held = packed.grid.element_size() // packed.dtype.itemsize
    return Weights(
        array(packed.words, "uint8", (-1,)),
        array(packed.grid, "int8" if packed.dtype == torch.int8 else "uint16", (blocks, rows, held)),
        array(packed.row_factors, "uint16", (-1,)),
        array(packed.block_factors, "uint16", (-1, blocks, held)),
        np.array(packed.ends),
        cut(packed.columns, packed.block_size),
    )
