"""A model to measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import tiny


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA on no grid, so that methods differ, by a name that the paper has."""
    folder = tmp_path_factory.mktemp("models") / "Llama-2-7b-hf"
    return tiny.save(tiny.make_model("llama", ternary=False), folder)
