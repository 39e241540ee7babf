"""A model for runs that are stopped, and the command that starts one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import tiny
from tests.harness.conftest import SMALL


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model off any ternary grid, so that every layer changes what the next one sees."""
    return tiny.save(tiny.make_model("qwen3", ternary=False), tmp_path_factory.mktemp("model"))


@pytest.fixture
def command(model: Path, words_file: Path, tmp_path: Path) -> list[object]:
    """Arguments of a run into tmp_path / "out"."""
    return [
        model,
        "--out",
        tmp_path / "out",
        "--calibration",
        words_file,
        "--eval",
        words_file,
        "--eval-seqlen",
        24,
        *SMALL,
    ]
