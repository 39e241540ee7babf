"""One rank's shards of the matrices that vLLM merges into one linear layer.

A rank of a column-parallel layer holds some rows of each matrix. Rows are stored on their own, so vLLM's own
loaders cut them, for every part that has a row per output: trits, alpha, mu and row factors.

A rank of a row-parallel layer holds the columns of its inputs. They may begin inside a byte of five trits or
inside a block, and a permutation spreads them over all blocks. `columns_of` takes them out exactly: every
weight keeps its trit and the alpha and mu of its block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import nan
from typing import Any

import torch

from harness.errors import UserError
from harness.ternary.format import StoredLayers, pack_base3, permutation_dtype, stored_parts, unpack_base3
from harness.ternary.kernels.tensors import Matrix
from harness.ternary.linear import TernaryLinear
from harness.ternary.reading import require_packed

# Parts with a row per output. A rank needs the others whole: they belong to columns.
BY_ROWS = ("trits", "scale", "shift", "row_factor")
# Values that no checkpoint holds: what still has them was not loaded.
_NOT_LOADED = {torch.uint8: 255, torch.int8: -128, torch.float16: nan}
# How vLLM names the parts of a layer that merges the projections of attention; it numbers those of others.
_ATTENTION: dict[Any, Any] = {"q": 0, "k": 1, "v": 2}
# Blocks of fewer columns take more bits for alpha and mu than for trits.
LEAST_WIDTH = 8

Shard = str | int | None


def columns_of(
    matrix: Matrix, block_size: int, inputs: range, least: int = LEAST_WIDTH
) -> tuple[Matrix, int]:
    """Take the columns of some inputs out of a matrix.

    The columns of a block stay together, in quantization order, in one or more new blocks. Columns with
    t = 0 fill up all new blocks but the last. They read inputs beyond the given ones, which must be 0.

    Parameters
    ----------
    matrix : Matrix
        All columns.
    block_size : int
        Columns of its blocks.
    inputs : range
        Original numbers of the columns to take.
    least : int
        Least number of columns in a new block.

    Returns
    -------
    part : Matrix
        Its first ``len(inputs)`` original columns are the given ones.
    width : int
        Columns of its blocks: `block_size` halved as often as it saves memory.
    """
    order = matrix.permutation.long()
    kept = ((order >= inputs.start) & (order < inputs.stop)).nonzero()[:, 0]
    counts = torch.bincount(kept // block_size, minlength=matrix.scale.shape[1])

    def bits_of_a_row(width: int) -> int:
        return int((-(-counts // width)).sum()) * (2 * width + 16 * matrix.scale.element_size())

    widths = [block_size]
    while widths[-1] % 2 == 0 and widths[-1] // 2 >= least:
        widths.append(widths[-1] // 2)
    width = min(widths, key=bits_of_a_row)

    pieces = -(-counts // width)
    block = kept // block_size
    in_block = torch.arange(len(kept), device=kept.device) - (counts.cumsum(0) - counts)[block]
    place = width * (pieces.cumsum(0) - pieces)[block] + in_block
    columns = int(place[-1]) + 1
    trits = matrix.trits.new_zeros(len(matrix.trits), columns)
    trits[:, place] = matrix.trits[:, kept]
    filling = torch.ones(columns, dtype=torch.bool, device=kept.device)
    filling[place] = False
    permutation = torch.empty(columns, dtype=torch.long, device=kept.device)
    permutation[place] = order[kept] - inputs.start
    permutation[filling] = torch.arange(len(inputs), columns, device=kept.device)
    source = torch.repeat_interleave(torch.arange(len(pieces), device=kept.device), pieces)
    parts: dict[str, Any] = {**matrix._asdict(), "trits": trits, "permutation": permutation}
    for name in ("scale", "shift", "scale_factor", "shift_factor"):
        if parts[name] is not None:
            parts[name] = parts[name][..., source]
    return Matrix(**parts), width


def ternary_layer(matrix: Matrix, block_size: int, dtype: torch.dtype) -> TernaryLinear:
    """Make a layer without a bias of a matrix."""
    rows, columns = matrix.trits.shape
    identity = torch.arange(columns, device=matrix.permutation.device)
    permuted = not torch.equal(matrix.permutation.long(), identity)
    grid = str(matrix.scale.dtype).removeprefix("torch.")
    with torch.device("meta"):
        layer = TernaryLinear(columns, rows, block_size, grid, permuted, False, dtype, matrix.shift is None)
    kind = getattr(torch, str(permutation_dtype(columns)))
    stored: dict[str, Any] = {**matrix._asdict(), "trits": pack_base3(matrix.trits)}
    stored["permutation"] = matrix.permutation.to(kind) if permuted else None
    for name, tensor in stored.items():
        setattr(layer, name, None if tensor is None else tensor.contiguous())
    return layer


class LayerShards:
    """Collects the tensors of a layer on one rank.

    Parameters
    ----------
    names : list of str
        The matrices of the checkpoint that the layer merges.
    stored : StoredLayers
        The checkpoint's configuration.
    rows : list of int
        Rows of each part of the layer on this rank. A layer has a part for every matrix, or a single matrix
        with several parts.
    ranks : int
        Ranks that share the rows of a matrix; several may hold the same ones.
    columns : int
        Columns of every matrix.
    inputs : range
        Those that this rank multiplies by.

    Raises
    ------
    UserError
        If there is neither one matrix nor one for every part.
    """

    def __init__(
        self, names: list[str], stored: StoredLayers, rows: list[int], ranks: int, columns: int, inputs: range
    ) -> None:
        if len(names) not in (1, len(rows)):
            raise UserError(
                f"vLLM splits {', '.join(names)} into {len(rows)} parts; only one each is supported"
            )
        self.names, self.stored = names, stored
        self.rows = [sum(rows)] if len(names) == 1 else rows
        self.split = len(names) == 1 and len(rows) > 1
        self.ranks, self.columns, self.inputs = ranks, columns, inputs
        self._whole: dict[str, Any] = {}

    def parameters(self) -> dict[str, torch.Tensor]:
        """Make tensors to load into, by their names; those that are not in `BY_ROWS` are empty."""
        parts: dict[str, Any] = {}
        for index in range(len(self.names)):
            parts |= self._parts(index, sum(self.rows))
        return {
            part: torch.full(shape if part in BY_ROWS else (0,), _NOT_LOADED.get(kind, 0), dtype=kind)
            for part, (kind, shape) in parts.items()
        }

    def load(self, part: str, tensor: torch.Tensor, shard: Shard, load_rows: Callable[[], None]) -> None:
        """Take in a tensor of the checkpoint.

        Parameters
        ----------
        part : str
            Which of the tensors that store a matrix.
        tensor : tensor
            All of it.
        shard : str, int or None
            vLLM's name of the matrix in the layer; None if there is but one.
        load_rows : callable
            Copies this rank's rows to the parameter; called for tensors in `BY_ROWS`.

        Raises
        ------
        UserError
            If the tensor is damaged, or does not fit the model; the message names it.
        """
        index = 0 if shard is None else _ATTENTION.get(shard, shard)
        if index not in range(len(self.names)):
            raise UserError(f"vLLM has a part {shard!r} for {', '.join(self.names)}; this is not supported")
        name, held = f"{self.names[index]}.{part}", self.rows[index]
        rows = len(tensor) if part in BY_ROWS else 0
        if part in BY_ROWS and not self.split and (rows % held or held * self.ranks % rows):
            raise UserError(f"{name} has {rows} rows, but vLLM's model has up to {held * self.ranks}")
        parts = self._parts(index, rows)
        if part not in parts:
            raise UserError(
                f"{name} is stored, but config.json says that {self.names[index]} is not reordered"
            )
        kind, shape = parts[part]
        with torch.device("cpu"):  # where the tensor is, whatever vLLM has made the default
            require_packed(name, part, tensor, torch.empty(shape, dtype=kind, device="meta"), self.columns)
        if part in BY_ROWS:
            load_rows()
        else:
            self._whole[name] = tensor.clone()  # the file may be closed before it is used

    def layers(
        self, loaded: dict[str, torch.Tensor], dtype: torch.dtype, least: int = LEAST_WIDTH
    ) -> list[TernaryLinear]:
        """Make the layers of this rank, one for every matrix.

        Parameters
        ----------
        loaded : dict of str to tensor
            `parameters`, after loading.
        dtype : torch.dtype
            dtype that dequantized weights are rounded to.
        least : int
            Least number of columns in a block that is cut.

        Raises
        ------
        UserError
            If a tensor was not loaded.
        """
        found, first = [], 0
        for index, (name, rows) in enumerate(zip(self.names, self.rows, strict=True)):
            parts: dict[str, Any] = {"shift": None}
            for part in self._parts(index, rows):
                tensor = loaded[part][first : first + rows]
                if part not in BY_ROWS:
                    tensor = self._whole.pop(f"{name}.{part}", None)
                if tensor is None or (part in BY_ROWS and _not_loaded(tensor)):
                    raise UserError(f"the tensor {name}.{part} is missing")
                parts[part] = tensor.to(loaded["trits"].device)
            parts["trits"] = unpack_base3(parts["trits"], self.columns)
            parts.setdefault("permutation", torch.arange(self.columns, device=parts["trits"].device))
            matrix, width = Matrix(**parts), self.stored.block_size
            if len(self.inputs) < self.columns:
                matrix, width = columns_of(matrix, width, self.inputs, least)
            found.append(ternary_layer(matrix, width, dtype))
            first += rows
        return found

    def _parts(self, index: int, rows: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        permuted = self.names[index] not in self.stored.unpermuted
        stored = self.stored
        return stored_parts(rows, self.columns, stored.block_size, stored.grid, permuted, stored.symmetric)


def _not_loaded(tensor: torch.Tensor) -> bool:
    empty = _NOT_LOADED[tensor.dtype]
    return bool((tensor.isnan() if tensor.is_floating_point() else tensor == empty).any())


def product(layers: Sequence[TernaryLinear], x: torch.Tensor) -> torch.Tensor:
    """Multiply by the matrices of `LayerShards.layers`; (..., m) to (..., n), outputs side by side."""
    missing = layers[0].in_features - x.shape[-1]
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    packed = layers[0].packed
    if packed is None or any(layer.packed is not packed for layer in layers):
        return torch.cat([layer(x) for layer in layers], -1)
    y = torch.ops.pt2_llm.ternary_linear(x.reshape(-1, x.shape[-1]), *packed.tensors())
    return y.view(*x.shape[:-1], y.shape[-1])
