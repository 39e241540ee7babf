"""GGUF files as original models: what the file says is what the model computes, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from harness.models.gguf import build_model
from harness.models.gguf_config import ARCHITECTURES, describe
from harness.models.gguf_file import GgufFile
from tests.harness.models.gguf_cases import CASES
from tests.harness.models.gguf_files import logits


def read(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    file = GgufFile(path)
    model, ignored = build_model(file, describe(file), dtype)
    assert not ignored
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_model_computes_what_the_file_says(name: str, tmp_path: Path) -> None:
    """As does the model whose config is saved and read again, which is how a checkpoint comes back."""
    expected, content = CASES[name].make()
    model = read(content.write(tmp_path / "a.gguf"))
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    for one in (model, again):
        torch.testing.assert_close(logits(one), logits(expected), rtol=2e-4, atol=2e-4)


def test_every_architecture_has_a_case() -> None:
    assert {case.architecture for case in CASES.values()} == ARCHITECTURES.keys()
