"""What is committed agrees: the Markdown with the results, README with both."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import harness
from harness.files import read_json
from harness.reproduce.render import markdown_of, markdown_table

ROOT = Path(harness.__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "reproduce" / "reproduce.json"
RATES = RESULTS.parent / "figure4" / RESULTS.name


@pytest.mark.parametrize("results", [RESULTS, RATES], ids=["tables", "rates"])
def test_the_committed_markdown_is_that_of_the_committed_results(results: Path) -> None:
    assert results.with_suffix(".md").read_text(encoding="utf-8") == markdown_of(read_json(results))


def test_the_readme_has_the_committed_rates() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    original, paper, best = [
        (f"{row['prefill']:.0f}", f"{row['decode']:.1f}")
        for row in read_json(RATES)["results"]["figure4"]["rows"]
    ]
    assert "read {} tokens/s and wrote {}".format(*original) in readme
    assert "by `best` {} and {}".format(*best) in readme
    assert "reordered columns {} and {}".format(*paper) in readme


def test_the_readme_shows_the_committed_results() -> None:
    """Every row of the table that README takes from the results is a row of theirs."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("benchmarks/reproduce/reproduce.json") :]
    lines = section[: section.index("\n## ")].splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    shown = list(itertools.takewhile(lambda line: line.startswith("|"), lines[header + 1 :]))
    rows = [line for table in read_json(RESULTS)["results"].values() for line in markdown_table(table)[2:]]
    assert len(shown) > 5
    assert set(shown) <= set(rows)
