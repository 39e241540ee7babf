"""Gram matrices of calibration inputs, summed as the inputs come."""

from __future__ import annotations

import torch

from harness.compute import HOST

CHUNK_TOKENS = 8192

SUMS = "float32 products, float64 sums"


class GramSum:
    """Sum of XᵀX over many rows: float32 products of a chunk, chunks summed in float64.

    On a CUDA device 16-bit inputs are multiplied as they are, which tensor cores do exactly; they add up in
    float32, but cut off what they cannot hold. Elsewhere inputs are widened first.

    Parameters
    ----------
    columns : int
        Width m of the inputs.
    device : torch.device
        Where the inputs and the sum are.
    """

    def __init__(self, columns: int, device: torch.device = HOST) -> None:
        self.columns = columns
        self._total = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self._chunk = torch.zeros(columns, columns, device=device)
        self._rows = 0

    def add(self, X: torch.Tensor) -> None:
        """Add the rows of X, (rows, m) 16-bit or float32; float64 is rounded to it."""
        for part in X.split(CHUNK_TOKENS):
            if self._rows + len(part) > CHUNK_TOKENS:
                self._flush()
            if part.is_cuda and part.element_size() == 2:
                self._chunk += torch.mm(part.T, part, out_dtype=torch.float32)
            else:
                part = part.float()
                self._chunk.addmm_(part.T, part)
            self._rows += len(part)

    def finish(self) -> torch.Tensor:
        """The symmetric (m, m) float64 sum; more rows may be added to it."""
        self._flush()
        # The product of a matrix with itself is symmetric only to rounding; one half is as good as the other.
        below = self._total.tril(-1)
        self._total.tril_()
        self._total += below.T
        return self._total

    def _flush(self) -> None:
        self._total += self._chunk
        self._chunk.zero_()
        self._rows = 0
