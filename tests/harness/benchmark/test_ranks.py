"""What is counted of processes that share a run, against figures worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.benchmark.ranks import rank_counts

RESULTS = Path(__file__).parents[3] / "benchmarks" / "ranks.json"


def test_what_must_be_waited_for_of_eight_processes() -> None:
    """By best: q beside k and v, o alone, gate beside up, down alone; rows cost 20 times what factors do."""
    m, k = 4096, 11008
    waited = 20 * m**2 * (2 * m + k) + 3 * m**3 + 20 * k**2 * m + k**3
    total = 20 * m**2 * (4 * m + 2 * k) + 6 * m**3 + 20 * k**2 * m + k**3
    counted = rank_counts("llama-7b", "best", 128, 2048, (1, 8))
    assert counted["1"]["share_of_the_fits_of_the_busiest"] == 1
    assert counted["8"]["share_of_the_fits_of_the_busiest"] == pytest.approx(waited / total, abs=1e-3)


@pytest.mark.parametrize("shape", ["llama-7b", "llama2-70b"])
def test_the_counts_of_the_readme_can_be_made_again(shape: str) -> None:
    counted = json.loads(RESULTS.read_text())["results"]["counted"][shape]
    assert counted == rank_counts(shape, "best", 128, 2048, (1, 2, 4, 8))
