"""Sums over shards are exact: the order in which they are taken, and by whom, does not matter."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch

from harness.calibration import gram
from harness.calibration.gram import PANEL_ROWS, ProductSum, windows_per_shard
from harness.calibration.passage import own_windows
from harness.distributed.ranks import Ranks
from harness.errors import UserError


def shards(count: int, rows: int, columns: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Factors of one row, so that products are exact, over 60 binary orders of magnitude; some cancel."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        a = torch.randint(-4095, 4096, (1, rows), generator=generator).float()
        b = torch.randint(-4095, 4096, (1, columns), generator=generator).float()
        found.append((a * 2.0 ** torch.randint(-30, 30, (1, 1), generator=generator), b))
    found += [(-a, b) for a, b in found[: count // 3]]
    return found


def summed(parts: list[tuple[torch.Tensor, torch.Tensor]], rows: int, columns: int) -> ProductSum:
    total = ProductSum(rows, columns)
    for a, b in parts:
        total.add(a, b)
        total.end_shard()
    return total


@pytest.mark.parametrize("entries", [1, 7, 1 << 15])
def test_a_sum_is_the_exact_one_rounded_once(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "_ENTRIES_ON_HOST", entries)
    parts = shards(30, 3, 4)
    found = summed(parts, 3, 4).finish()
    for i in range(3):
        for j in range(4):
            exact = sum(Fraction(float(a[0, i])) * Fraction(float(b[0, j])) for a, b in parts)
            assert float(found[i, j]) == float(exact)


@pytest.mark.parametrize("symmetric", [False, True])
def test_sums_of_parts_in_any_order_give_the_same_bytes(symmetric: bool) -> None:
    columns = PANEL_ROWS + 3  # two panels
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(5, columns, generator=generator)
        * 10.0 ** float(torch.randint(-4, 5, (), generator=generator))
        for _ in range(6)
    ]

    def part(own: list[torch.Tensor]) -> ProductSum:
        total = ProductSum(columns, columns, symmetric=symmetric)
        for X in own:
            total.add(X, X if symmetric else X.flip(1))
            total.end_shard()
        return total

    whole = part(inputs).finish()
    for chosen in list(combinations(range(6), 2))[:5]:
        total = part([inputs[i] for i in chosen])
        total.merge(part([X for i, X in enumerate(inputs) if i not in chosen][::-1]).panels())
        assert torch.equal(total.finish(), whole)
    naive = torch.zeros_like(whole)
    for X in inputs[::-1]:
        naive += ((X.T @ X) if symmetric else (X.T @ X.flip(1))).double()
    assert not torch.equal(naive.tril(), whole.tril())  # which order matters to


def test_only_what_counts_of_a_symmetric_sum_is_sent() -> None:
    columns = 2 * PANEL_ROWS + 3
    total = ProductSum(columns, columns, symmetric=True)
    shapes = [tuple(rounded.shape) for rounded, _ in total.panels()]
    assert shapes == [(PANEL_ROWS, PANEL_ROWS), (PANEL_ROWS, 2 * PANEL_ROWS), (3, columns)]


@pytest.mark.parametrize(
    ("windows", "seqlen"), [(128, 2048), (16, 1024), (11, 24), (3, 24), (20, 10000), (1, 5)]
)
def test_processes_hold_neighbouring_whole_shards_of_all_windows(windows: int, seqlen: int) -> None:
    shard = windows_per_shard(windows, seqlen)
    assert shard == 1 or shard * seqlen <= gram.CHUNK_TOKENS
    count = -(-windows // shard)
    assert count >= min(windows, gram.FEWEST_SHARDS)
    for size in range(1, count + 1):
        parts = [own_windows(windows, seqlen, Ranks(rank, size)) for rank in range(size)]
        assert [window for part in parts for window in part] == list(range(windows))
        assert all(part.start % shard == 0 and len(part) > 0 for part in parts)
        lengths = [-(-len(part) // shard) for part in parts]
        assert max(lengths) - min(lengths) <= 1
    with pytest.raises(UserError, match=f" {count} shards?: {count + 1} processes cannot share"):
        own_windows(windows, seqlen, Ranks(0, count + 1))


def test_a_shard_ends_where_processes_may_part() -> None:
    """Two shards of one process give what two processes give, each with one; not so without the end."""
    X = np.random.default_rng(0).standard_normal((200, 5)).astype(np.float32)
    halves = [torch.from_numpy(X[:100]), torch.from_numpy(X[100:])]
    one = ProductSum(5, 5)
    for half in halves:
        one.add(half, half)
        one.end_shard()
    first, second = (ProductSum(5, 5) for _ in halves)
    first.add(halves[0], halves[0])
    second.add(halves[1], halves[1])
    first.merge(second.panels())
    found = one.finish()
    assert torch.equal(found, first.finish())
    joined = ProductSum(5, 5)
    for half in halves:
        joined.add(half, half)
    assert not torch.equal(joined.finish(), found)
