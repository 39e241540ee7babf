"""Evaluation is compared with as many bare forward passes as it needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import LlamaForCausalLM

from harness.benchmark import evaluation
from harness.benchmark.__main__ import main as benchmark_main


def test_evaluation_takes_no_forward_pass_but_the_bare_ones(
    tmp_path: Path,
    llama: Path,
    words_file: Path,
    run_main: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes = 0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal passes
        passes += isinstance(module, LlamaForCausalLM)

    monkeypatch.setattr(evaluation, "time", SimpleNamespace(perf_counter=lambda: passes))
    file = tmp_path / "evaluate.json"
    size = ("--seqlen", "24", "--windows", "3", "--rounds", "2")
    hook = register_module_forward_hook(count)
    try:
        assert run_main(benchmark_main, "evaluate", file, "--model", llama, "--data", words_file, *size) == 0
    finally:
        hook.remove()
    found = json.loads(file.read_text())["results"]
    assert found["seconds"] == {"bare": 3, "perplexity": 3, "divergence": 6}
    assert found["ratio_to_bare_passes"] == {"perplexity": 1, "divergence": 1}
