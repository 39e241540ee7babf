"""Accumulate Gram matrices of calibration inputs."""

from __future__ import annotations

import torch

from harness.compute import HOST

CHUNK_TOKENS = 8192

SUMS = "float32 products, float64 sums"


class ProductSum:
    """Sum of AᵀB over many rows: float32 products of a chunk, chunks summed in float64.

    On a CUDA device, tensor cores multiply 16-bit inputs: products are exact, and accumulated in float32 with
    truncation instead of rounding. Other inputs are widened to float32 first.

    Parameters
    ----------
    rows, columns : int
        Widths of A and of B.
    device : torch.device
        Device of the factors and of the sum.
    """

    def __init__(self, rows: int, columns: int, device: torch.device = HOST) -> None:
        self.columns = columns
        self._total = torch.zeros(rows, columns, dtype=torch.float64, device=device)
        self._chunk = torch.zeros(rows, columns, device=device)
        self._rows = 0

    def add(self, A: torch.Tensor, B: torch.Tensor) -> None:
        """Add the rows of A and B, 16-bit or float32; float64 is rounded to float32."""
        for a, b in zip(A.split(CHUNK_TOKENS), B.split(CHUNK_TOKENS), strict=True):
            if self._rows + len(b) > CHUNK_TOKENS:
                self._flush()
            if b.is_cuda and a.dtype == b.dtype and b.element_size() == 2:
                self._chunk += torch.mm(a.T, b, out_dtype=torch.float32)
            else:
                self._chunk.addmm_(a.float().T, b.float())
            self._rows += len(b)

    def finish(self) -> torch.Tensor:
        """Return the float64 sum; more rows may be added afterwards."""
        self._flush()
        return self._total

    def _flush(self) -> None:
        self._total += self._chunk
        self._chunk.zero_()
        self._rows = 0


class GramSum:
    """Sum of XᵀX over many rows, as `ProductSum` computes it, but exactly symmetric.

    Parameters
    ----------
    columns : int
        Width m of the inputs.
    device : torch.device
        Device of the inputs and of the sum.

    Attributes
    ----------
    rows : int
        Number of rows added.
    """

    def __init__(self, columns: int, device: torch.device = HOST) -> None:
        self.columns, self.rows = columns, 0
        self._sum = ProductSum(columns, columns, device)

    def add(self, X: torch.Tensor) -> None:
        """Add the rows of X, (rows, m)."""
        self.rows += len(X)
        self._sum.add(X, X)

    def finish(self) -> torch.Tensor:
        """Return the symmetric (m, m) float64 sum; more rows may be added afterwards."""
        total = self._sum.finish()
        # XᵀX is computed symmetric only up to rounding; copy the lower half to the upper.
        below = total.tril(-1)
        total.tril_()
        total += below.T
        return total
