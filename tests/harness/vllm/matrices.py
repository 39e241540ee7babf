"""Packed matrices as a checkpoint stores them, with their weights decoded on their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch

from harness.ternary.format import StoredLayers
from harness.vllm.shards import BY_ROWS, LayerShards, Shard
from reference.packing import pack_base3

# Types of alpha and mu, and whether there is a permutation.
KINDS = [(grid, permuted) for grid in ("float16", "int8") for permuted in (False, True)]


@dataclass
class Stored:
    """A matrix as a checkpoint stores it, and its weights, decoded here column by column.

    All numbers are small multiples of a power of two: no product or sum of them is rounded.
    """

    name: str
    rows: int
    columns: int
    block_size: int = 64
    grid: str = "float16"
    permuted: bool = False
    symmetric: bool = False
    tensors: dict[str, torch.Tensor] = field(init=False)
    weights: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng([self.rows, self.columns, len(self.name)])
        n, m, blocks = self.rows, self.columns, -(-self.columns // self.block_size)
        trits = random.integers(-1, 2, (n, m)).astype(np.int8)
        codes = random.integers(-5, 6, (2, n, blocks))
        if self.symmetric:
            codes[1] = 0
        order = random.permutation(m) if self.permuted else np.arange(m)
        factors = np.ones(n), np.ones((2, blocks))
        if self.grid == "int8":
            factors = 2.0 ** random.integers(-1, 2, n), 2.0 ** random.integers(-1, 2, (2, blocks))
        alpha, mu = codes * factors[0][:, None] * factors[1][:, None]
        self.weights = torch.empty(n, m)
        for j in range(m):
            b = j // self.block_size
            self.weights[:, order[j]] = torch.from_numpy(alpha[:, b] * trits[:, j] + mu[:, b]).float()
        parts = {"trits": pack_base3(trits), "scale": codes[0], "shift": codes[1]}
        parts = {
            part: values if part == "trits" else values.astype(self.grid) for part, values in parts.items()
        }
        if self.grid == "int8":
            named = {"row_factor": factors[0], "scale_factor": factors[1][0], "shift_factor": factors[1][1]}
            parts |= {part: values.astype(np.float16) for part, values in named.items()}
        if self.symmetric:
            parts = {part: values for part, values in parts.items() if "shift" not in part}
        if self.permuted:
            parts["permutation"] = order.astype(np.min_scalar_type(m - 1))
        self.tensors = {
            part: torch.from_numpy(np.ascontiguousarray(values)) for part, values in parts.items()
        }


def shards_of(
    matrices: list[Stored], rows: list[int], ranks: int, inputs: range | None = None
) -> tuple[LayerShards, dict[str, torch.Tensor]]:
    """An empty layer on one rank, and its parameters."""
    names = [matrix.name for matrix in matrices]
    unpermuted = [matrix.name for matrix in matrices if not matrix.permuted]
    block_size, grid, columns = matrices[0].block_size, matrices[0].grid, matrices[0].columns
    stored = StoredLayers(block_size, grid, names, unpermuted, None, [], matrices[0].symmetric)
    shards = LayerShards(names, stored, rows, ranks, columns, range(columns) if inputs is None else inputs)
    return shards, shards.parameters()


def load(
    shards: LayerShards,
    parameters: dict[str, torch.Tensor],
    matrix: Stored,
    shard: Shard,
    place: slice,
    held: slice,
) -> None:
    """Load a matrix as vLLM does: each tensor on its own, `held` rows of it to their `place`."""
    for part, tensor in matrix.tensors.items():
        copy = partial(parameters[part][place].copy_, tensor[held]) if part in BY_ROWS else pytest.fail
        shards.load(part, tensor, shard, copy)


def small_integers(*shape: int) -> torch.Tensor:
    return torch.randint(-4, 5, shape).float()
