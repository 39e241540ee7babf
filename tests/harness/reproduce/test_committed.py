"""What is committed agrees: the Markdown with the results, README with both."""

from __future__ import annotations

import itertools
from pathlib import Path

import harness
from harness.files import read_json
from harness.reproduce.render import markdown_of, markdown_table

ROOT = Path(harness.__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "reproduce" / "reproduce.json"


def test_the_committed_markdown_is_that_of_the_committed_results() -> None:
    assert RESULTS.with_suffix(".md").read_text(encoding="utf-8") == markdown_of(read_json(RESULTS))


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
