"""What the tests in vLLM need: ranks that are not there, and a ternary model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Make layers believe that they are on one of several ranks."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    def be(rank: int, ranks: int) -> None:
        for module in (linear, parameter, vocab_parallel_embedding):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)

    with set_current_vllm_config(VllmConfig()):
        be(0, 1)
        yield be


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M, ternarized by the paper's recipe: every matrix has a permutation."""
    out = tmp_path_factory.mktemp("smollm2") / "ternary"
    short: tuple[Any, ...] = ("--nsamples", 4, "--seqlen", 256, "--eval-windows", 1)
    command = [sys.executable, "-m", "harness.quantize", "--recipe", "paper", *short, "--out", out]
    subprocess.run([*map(str, command)], check=True)
    return out
