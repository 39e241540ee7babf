"""What fits need to know about the inputs of matrices, and the sums over windows that it comes from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.calibration.gram import GramSum, ProductSum
from harness.compute import HOST


@dataclass(frozen=True)
class Statistics:
    """What a fit needs to know about the inputs of one group of matrices.

    Attributes
    ----------
    gram : (m, m) float64 tensor
        Gram matrix of the inputs, filled up with average ones where they are few (`calibration.experts`).
    seen : (m, m) float64 tensor
        Gram matrix of the inputs alone.
    tokens : int
        Number of inputs.
    lost : tensor, optional
        (n, m): the lost products (`reference.targets.lost_products`) of the only matrix of the group.
        Or (m, m): products of the inputs' differences with the inputs, which weights turn into lost products.
        None for matrices that are fitted to their own weights.
    of_outputs : bool
        Whether `lost` is of the first kind.
    """

    gram: torch.Tensor
    seen: torch.Tensor
    tokens: int
    lost: torch.Tensor | None = None
    of_outputs: bool = False

    def lost_products(self, weight: torch.Tensor) -> torch.Tensor:
        """Lost products of a matrix of the group, (n, m) float64; `lost` must not be None."""
        assert self.lost is not None
        return self.lost if self.of_outputs else weight.to(self.lost.dtype) @ self.lost


@dataclass(frozen=True)
class Rows:
    """What one window adds to the sums of a group of matrices.

    Attributes
    ----------
    inputs : (rows, m) tensor
        Inputs in the ternary model.
    lost : tensor, optional
        (rows, n): outputs that are wanted beyond those of the original weights; or (rows, m): the original
        model's inputs less these.
    root : (rows, 1) tensor, optional
        Roots of the rows' weights; 1 if left out.
    """

    inputs: torch.Tensor
    lost: torch.Tensor | None = None
    root: torch.Tensor | None = None


class Sums:
    """Sums over windows for one group of matrices.

    Parameters
    ----------
    columns : int
        Width m of the inputs.
    rows : int
        Rows of the lost products; 0 to sum none.
    device : torch.device
        Device of the inputs and of the sums.
    of_outputs : bool
        What the lost products are, as in `Statistics`.
    gram : bool
        Whether to sum the Gram matrix.

    Attributes
    ----------
    lost : ProductSum, optional
        Sum of the lost products.
    """

    def __init__(
        self,
        columns: int,
        rows: int = 0,
        device: torch.device = HOST,
        of_outputs: bool = False,
        gram: bool = True,
    ) -> None:
        self._gram = GramSum(columns, device) if gram else None
        self.lost = ProductSum(rows, columns, device) if rows else None
        self.of_outputs = of_outputs

    @property
    def gram(self) -> GramSum:
        """Sum of the Gram matrix; there must be one."""
        assert self._gram is not None
        return self._gram

    def add(self, rows: Rows) -> None:
        """Add inputs of a window."""
        x = rows.inputs if rows.root is None else rows.root * rows.inputs
        if self._gram is not None:
            self._gram.add(x)
        if self.lost is not None and rows.lost is not None:
            self.lost.add(rows.lost if rows.root is None else rows.root * rows.lost, x)

    def end_shard(self) -> None:
        """Add what a shard of windows gave to the exact sums."""
        if self._gram is not None:
            self._gram.end_shard()
        if self.lost is not None:
            self.lost.end_shard()
