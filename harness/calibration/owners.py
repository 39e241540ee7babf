"""Which process fits which matrix, and how the sums over windows get there.

Matrices that are fitted at the same time are dealt to processes by what their fits cost. Each process has
summed over its own windows; for every group of matrices that share inputs, the sums are added up along a
binary tree whose root is an owner of the group, which sends the result to its other owners, if there are any.
Sums are exact (`calibration.gram`), so the result is the same for any number of processes.

Bytes sent for a group with inputs of width m, with N processes, k of which own a matrix of the group: of the
Gram matrix, its lower half in panels of `PANEL_ROWS` rows, ``lower(m)`` entries (the sum over panels of their
rows times their last column), in pairs of float64 to the root, and in float64 from there:

    (N - 1) * 16 * lower(m) + (k - 1) * 8 * lower(m)

and, with targets, of the (r, m) lost products ``(N - 1) * 16 * r * m + (k - 1) * 8 * r * m``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from harness.calibration.gram import ProductSum
from harness.calibration.passage import WorkingLayer
from harness.calibration.sums import Statistics, Sums
from harness.distributed.ranks import Ranks
from harness.models.experts import family

# Rank of the process that fits a matrix, by the name of the matrix in its layer.
Owners = dict[str, int]


# Seconds for a row and squared column beside those for a cubed column, in fits by the recipe `best` on a CPU:
# 19 to 20 at 576 x 1536 and 2048 x 2048. The former are mostly products by H, the latter the factors of the
# Gram matrix. SSR, which updates the inverse block by block, and refines nothing by `paper`, has 3.
ROW_COST = 20


def fit_cost(rows: int, columns: int) -> int:
    """What the fit of a matrix costs beside others: that of its rows, and of factors of its Gram matrix."""
    return ROW_COST * rows * columns**2 + columns**3


def deal(shapes: Mapping[str, Sequence[int]], size: int) -> Owners:
    """Deal matrices that are fitted at the same time to processes: the costliest first, to the least busy.

    Parameters
    ----------
    shapes : mapping of str to (int, int)
        Rows and columns of the matrices, by name.
    size : int
        Number of processes.
    """
    costs = {name: fit_cost(*shape) for name, shape in shapes.items()}
    busy = [0] * size
    owners = {}
    for name in sorted(shapes, key=lambda name: -costs[name]):  # stable: ties go by the order of use
        rank = busy.index(min(busy))
        owners[name] = rank
        busy[rank] += costs[name]
    return owners


def own_statistics(
    layer: WorkingLayer, groups: list[list[str]], sums: list[Sums], owners: Owners, ranks: Ranks
) -> dict[str, Statistics]:
    """Bring the sums of all processes to the owners of the matrices, and round them.

    Experts with fewer tokens than columns get average tokens (`calibration.experts`).

    Parameters
    ----------
    layer : WorkingLayer
        The layer.
    groups : list of lists of str
        Matrices that share an input.
    sums : list of Sums
        Sums over this process's windows for each group; they are used up.
    owners : dict of str to int
        Who fits which matrix.
    ranks : Ranks
        The processes.

    Returns
    -------
    dict of str to Statistics
        By the name of a matrix, for those of this process.
    """
    tokens = ranks.total([total.gram.rows for total in sums])
    averages = _averages(layer, groups, sums, tokens, owners, ranks)
    known: dict[str, Statistics] = {}
    for group, total, count in zip(groups, sums, tokens, strict=True):
        places = [owners[name] for name in group]
        gram = _at_owners(total.gram.products, places, ranks)
        lost = None if total.lost is None else _at_owners(total.lost, places, ranks)
        if gram is None:
            continue
        missing, filled = len(gram) - count, gram
        if missing > 0 and (average := averages.get(family(layer.module, group[0]))) is not None:
            filled = gram + missing * average
        statistics = Statistics(filled, gram, count, lost, total.of_outputs)
        known |= {name: statistics for name in group if owners[name] == ranks.rank}
    return known


def own_lost(
    groups: list[list[str]], sums: list[Sums], owners: Owners, ranks: Ranks
) -> dict[str, torch.Tensor]:
    """Bring lost products that were summed alone to the owners of the matrices; return this process's."""
    found: dict[str, torch.Tensor] = {}
    for group, total in zip(groups, sums, strict=True):
        assert total.lost is not None
        lost = _at_owners(total.lost, [owners[name] for name in group], ranks)
        if lost is not None:
            found |= {name: lost for name in group if owners[name] == ranks.rank}
    return found


def _averages(
    layer: WorkingLayer,
    groups: list[list[str]],
    sums: list[Sums],
    tokens: list[int],
    owners: Owners,
    ranks: Ranks,
) -> dict[str | None, torch.Tensor | None]:
    """Average Gram matrices of a token of the experts, by their kind, for kinds of which some lack tokens."""
    kinds: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        if kind := family(layer.module, group[0]):
            kinds.setdefault(kind, []).append(place)
    found: dict[str | None, torch.Tensor | None] = {}
    for kind, places in kinds.items():
        columns = sums[places[0]].gram.columns
        lacking = [owners[name] for place in places if tokens[place] < columns for name in groups[place]]
        if lacking:
            total = ProductSum(columns, columns, sums[places[0]].gram.device, symmetric=True)
            for place in places:
                total.merge(sums[place].gram.products.panels())
            average = _at_owners(total, lacking, ranks)
            if average is not None:
                average /= max(sum(tokens[place] for place in places), 1)
            found[kind] = average
    return found


def _at_owners(total: ProductSum, owners: list[int], ranks: Ranks) -> torch.Tensor | None:
    """Add up a sum of all processes; return it rounded to its owners, and None to others."""
    root, *others = sorted(set(owners))
    place, step = (ranks.rank - root) % ranks.size, 1
    while step < ranks.size:
        if place % (2 * step):
            _send(total.panels(), (ranks.rank - step) % ranks.size, ranks)
            break
        if place + step < ranks.size:
            total.merge(_received(total, (ranks.rank + step) % ranks.size, ranks))
        step *= 2
    if ranks.rank == root:
        total.round()
        for other in others:
            _send(((rounded,) for rounded, _ in total.panels()), other, ranks)
        return total.finish()
    if ranks.rank in others:
        total.replace(ranks.receive(torch.empty_like(rounded), root) for rounded, _ in total.panels())
        return total.finish()
    return None


def _send(panels: Iterator[tuple[torch.Tensor, ...]], to: int, ranks: Ranks) -> None:
    for panel in panels:
        for part in panel:
            ranks.send(part, to)


def _received(total: ProductSum, source: int, ranks: Ranks) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The panels of another process's sum, which has the shape of this one's."""
    for rounded, rest in total.panels():
        yield ranks.receive(torch.empty_like(rounded), source), ranks.receive(torch.empty_like(rest), source)
