"""Calibrate experts: each is fitted to the tokens routed to it, and where they are few, to average ones too.

An expert whose matrix has m columns and that n tokens are routed to has a Gram matrix C of rank n at most.
With fewer tokens than columns, it is fitted to

    C + (m - n) * P,        P = sum of C over the experts of a layer / sum of n over them

which fills its tokens up to m with average ones. This is shrinkage of C/n towards P, by the weight 1 - n/m.
An expert without tokens is fitted to m average ones. Other multiples of P are hardly better
(``python -m harness.benchmark mixture --only few-tokens``). P sums what the experts' matrices really read:
for the matrix that reads tokens, every token counts as often as it is routed; for the one that writes, it is
what the experts that were chosen computed. The sums of all experts of a layer are taken in the same pass.
Where there are targets (`calibration.targets`), average tokens lack nothing: they draw an expert to its own
weights, to which one without tokens is fitted.
"""

from __future__ import annotations

import torch

from harness.calibration.passage import WorkingLayer
from harness.models.experts import Experts, family


class Routing:
    """The experts of the tokens of one window.

    Parameters
    ----------
    experts : Experts
        The experts.
    read : tuple of tensors
        What they read, as `Experts.reading` gives it.
    """

    def __init__(self, experts: Experts, read: tuple[torch.Tensor, ...]) -> None:
        self._experts = experts
        _, index, weights = read
        self._index, self._weights = index, weights.float()
        self.pairs = dict(enumerate(experts.routed(index)))

    def rows(self, number: int) -> torch.Tensor:
        """Places among the rows that are read of the tokens of an expert."""
        return self._experts.rows_of(self.pairs[number], self._index)

    def tokens(self, number: int) -> torch.Tensor:
        """Places in the window of the tokens of an expert."""
        return self.pairs[number] // self._index.shape[-1]

    def weights(self, number: int) -> torch.Tensor:
        """Routing weights of the tokens of an expert, (tokens, 1)."""
        return self._weights.reshape(-1, 1)[self.pairs[number]]

    def inner(self, experts: Experts, rows: torch.Tensor, numbers: set[int]) -> dict[int, torch.Tensor]:
        """What other experts, of the same routing, pass to ``down_proj`` where they read other rows."""
        pairs = {number: own for number, own in self.pairs.items() if number in numbers}
        return experts.inner(rows, self._index, pairs)

    def shares(self, missing: torch.Tensor, numbers: set[int]) -> dict[int, torch.Tensor]:
        """How far outputs of experts must move, so that their weighted sum moves by what is missing.

        Parameters
        ----------
        missing : (tokens, width) tensor
            What the sums lack, r.
        numbers : set of int
            Experts that move.

        Returns
        -------
        dict of int to (tokens of the expert, width) tensor
            w_te r_t / sum_f w_tf^2: of all moves that do so, the smallest ones.
        """
        moving = torch.zeros(self._experts.num_experts + 1, device=missing.device)
        moving[list(numbers)] = 1
        # An index beyond the experts stands for none.
        size = (moving[self._index.clamp(max=len(moving) - 1)] * self._weights.square()).sum(dim=1)
        scaled = missing / torch.where(size > 0, size, torch.inf)[:, None]
        return {number: self.weights(number) * scaled[self.tokens(number)] for number in numbers}


def batches(layer: WorkingLayer, groups: list[list[str]]) -> list[list[list[str]]]:
    """Split the groups of matrices that share an input, so that all experts of a layer come in one batch."""
    found: dict[str, list[list[str]]] = {}
    for group in groups:
        found.setdefault(family(layer.module, group[0]) or group[0], []).append(group)
    return list(found.values())
