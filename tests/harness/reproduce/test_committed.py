"""What is committed agrees: the Markdown with the results, README with both."""

from __future__ import annotations

from pathlib import Path

import harness
from harness.files import read_json
from harness.reproduce.render import markdown_of

ROOT = Path(harness.__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "reproduce" / "reproduce.json"


def test_the_committed_markdown_is_that_of_the_committed_results() -> None:
    assert RESULTS.with_suffix(".md").read_text(encoding="utf-8") == markdown_of(read_json(RESULTS))
