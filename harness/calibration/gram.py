"""Accumulate Gram matrices of calibration inputs."""

from __future__ import annotations

import torch

from harness.compute import HOST

CHUNK_TOKENS = 8192

SUMS = "float32 products, float64 sums"


class GramSum:
    """Sum of XᵀX over many rows: float32 products of a chunk, chunks summed in float64.

    On a CUDA device, tensor cores multiply 16-bit inputs: products are exact, and accumulated in float32 with
    truncation instead of rounding. Other inputs are widened to float32 first.

    Parameters
    ----------
    columns : int
        Width m of the inputs.
    device : torch.device
        Device of the inputs and of the sum.
    """

    def __init__(self, columns: int, device: torch.device = HOST) -> None:
        self.columns = columns
        self._total = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self._chunk = torch.zeros(columns, columns, device=device)
        self._rows = 0

    def add(self, X: torch.Tensor) -> None:
        """Add the rows of X, (rows, m) 16-bit or float32; float64 is rounded to float32."""
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
        """Return the symmetric (m, m) float64 sum; more rows may be added afterwards."""
        self._flush()
        # XᵀX is computed symmetric only up to rounding; copy the lower half to the upper.
        below = self._total.tril(-1)
        self._total.tril_()
        self._total += below.T
        return self._total

    def _flush(self) -> None:
        self._total += self._chunk
        self._chunk.zero_()
        self._rows = 0
