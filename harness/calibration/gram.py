"""Accumulate Gram matrices of calibration inputs, so that neither order nor place of the sums matters.

The windows of a run are divided into shards of a few thousand tokens (`windows_per_shard`). Products of the
rows of one shard are summed in float32, in the order of its windows. Float32 numbers are therefore what is
summed over shards, and that is done exactly: every sum is a pair of float64 numbers, its rounded value and
what rounding has cost so far (two-sum: Knuth, The Art of Computer Programming, vol. 2, 4.2.2, theorem B).
Only the last step, `finish`, rounds. So the result is the same whichever process sums which shards, and in
whatever order their sums are put together.

A pair holds at least 105 bits. That is exact unless shards differ in one entry by more than a factor of about
2^70; even then the order could show only where the sum lies within 2^-50 of the middle between two float64
numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from harness.compute import HOST

# Tokens whose products are summed in float32.
CHUNK_TOKENS = 8192

# A run has at least so many shards, if it has as many windows: processes can share them.
FEWEST_SHARDS = 8

# Rows of a sum that processes send each other at a time.
PANEL_ROWS = 256

# Entries that a sum adds at a time: few enough for a CPU's cache, many enough for a GPU.
_ENTRIES_ON_HOST, _ENTRIES_ON_DEVICE = 1 << 15, 1 << 22

SUMS = "float32 products inside a shard of windows, exact sums over shards"


def windows_per_shard(windows: int, seqlen: int) -> int:
    """Return how many neighbouring windows make a shard; the last shard may have fewer."""
    return max(1, min(CHUNK_TOKENS // seqlen, windows // FEWEST_SHARDS))


class ProductSum:
    """Sum of AᵀB over many rows: float32 products inside a shard, exact sums over shards.

    On a CUDA device, tensor cores multiply 16-bit inputs: products are exact, and accumulated in float32 with
    truncation instead of rounding. Other inputs are widened to float32 first.

    Parameters
    ----------
    rows, columns : int
        Widths of A and of B.
    device : torch.device
        Device of the factors and of the sum.
    symmetric : bool
        Whether A is B. Then only what lies on and below the diagonal counts.
    """

    def __init__(self, rows: int, columns: int, device: torch.device = HOST, symmetric: bool = False) -> None:
        self.columns, self.symmetric = columns, symmetric
        self._total = torch.zeros(rows, columns, dtype=torch.float64, device=device)
        self._rest = torch.zeros_like(self._total)
        self._chunk = torch.zeros(rows, columns, device=device)
        self._rows = 0

    def add(self, A: torch.Tensor, B: torch.Tensor) -> None:
        """Add the rows of A and B, 16-bit or float32; float64 is rounded to float32."""
        for a, b in zip(A.split(CHUNK_TOKENS), B.split(CHUNK_TOKENS), strict=True):
            if self._rows + len(b) > CHUNK_TOKENS:
                self.end_shard()
            if b.is_cuda and a.dtype == b.dtype and b.element_size() == 2:
                self._chunk += torch.mm(a.T, b, out_dtype=torch.float32)
            else:
                self._chunk.addmm_(a.float().T, b.float())
            self._rows += len(b)

    def end_shard(self) -> None:
        """Add the float32 sums so far to the exact ones."""
        if self._rows:
            self._put(self._total, self._rest, self._chunk)
            self._chunk.zero_()
            self._rows = 0

    def panels(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The pair in panels of `PANEL_ROWS` rows; of symmetric sums, what counts."""
        self.end_shard()
        for part in self._parts():
            yield self._total[part], self._rest[part]

    def merge(self, panels: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add the panels of another sum of the same shape, exactly."""
        self.end_shard()
        for part, (total, rest) in zip(self._parts(), panels, strict=True):
            self._put(self._total[part], self._rest[part], total)
            self._rest[part] += rest

    def replace(self, panels: Iterator[torch.Tensor]) -> None:
        """Take the panels of another sum, rounded, in place of this one's."""
        for part, rounded in zip(self._parts(), panels, strict=True):
            self._total[part] = rounded
        self._rest.zero_()

    def _parts(self) -> Iterator[tuple[slice, slice]]:
        for first in range(0, len(self._total), PANEL_ROWS):
            last = min(first + PANEL_ROWS, len(self._total))
            yield slice(first, last), slice(0, last if self.symmetric else self.columns)

    def round(self) -> None:
        """Round the sum to float64."""
        self.end_shard()
        self._total += self._rest
        self._rest.zero_()

    def finish(self) -> torch.Tensor:
        """Round the sum to float64 and return it; nothing may be added afterwards."""
        self.round()
        del self._rest, self._chunk
        if self.symmetric:
            # XᵀX is computed symmetric only up to rounding; copy the lower half to the upper.
            below = self._total.tril(-1)
            self._total.tril_()
            self._total += below.T
        return self._total

    @staticmethod
    def _put(total: torch.Tensor, rest: torch.Tensor, more: torch.Tensor) -> None:
        """Add `more` to a pair, in place: total + rest grows by exactly `more`."""
        entries = _ENTRIES_ON_DEVICE if total.is_cuda else _ENTRIES_ON_HOST
        rows = max(1, entries // total.shape[1])
        for t, r, m in zip(total.split(rows), rest.split(rows), more.split(rows), strict=True):
            m = m.double()
            rounded = t + m
            of_m = rounded - t
            r += (t - (rounded - of_m)) + (m - of_m)
            t.copy_(rounded)


class GramSum:
    """Sum of XᵀX over many rows, as `ProductSum` computes it, and exactly symmetric.

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
    device : torch.device
        Device of the sum.
    products : ProductSum
        The sum.
    """

    def __init__(self, columns: int, device: torch.device = HOST) -> None:
        self.columns, self.rows, self.device = columns, 0, device
        self.products = ProductSum(columns, columns, device, symmetric=True)

    def add(self, X: torch.Tensor) -> None:
        """Add the rows of X, (rows, m)."""
        self.rows += len(X)
        self.products.add(X, X)

    def end_shard(self) -> None:
        """Add the float32 sums so far to the exact ones."""
        self.products.end_shard()

    def finish(self) -> torch.Tensor:
        """Return the symmetric (m, m) float64 sum; nothing may be added afterwards."""
        return self.products.finish()
