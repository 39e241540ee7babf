"""Packed matrices as a checkpoint stores them, with their weights decoded on their own."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from reference.packing import pack_base3


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
    tensors: dict[str, torch.Tensor] = field(init=False)
    weights: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng([self.rows, self.columns, len(self.name)])
        n, m, blocks = self.rows, self.columns, -(-self.columns // self.block_size)
        trits = random.integers(-1, 2, (n, m)).astype(np.int8)
        codes = random.integers(-5, 6, (2, n, blocks))
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
        if self.permuted:
            parts["permutation"] = order.astype(np.min_scalar_type(m - 1))
        self.tensors = {
            part: torch.from_numpy(np.ascontiguousarray(values)) for part, values in parts.items()
        }
