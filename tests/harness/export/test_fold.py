"""Orders of columns that are moved into the rows of other matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import harness
from harness.cli import EXIT_USAGE
from harness.export.__main__ import main as export_main
from tests.harness.export.checkpoints import SIZES, Run, config_of, read_gguf, to_gguf, write

# 4 heads of 32 columns, two to a value head.
HEADS, SHARING, WIDTH = 4, 2, 32


def foldable(name: str, columns: int) -> np.ndarray:
    """Any order for down_proj; for o_proj one within each head, the same where heads share a value head."""
    rng = np.random.default_rng(len(name))
    if name.endswith("down_proj"):
        return rng.permutation(columns)
    if name.endswith("o_proj"):
        inside = [rng.permutation(WIDTH) for _ in range(HEADS // SHARING)]
        return np.concatenate([WIDTH * head + inside[head // SHARING] for head in range(HEADS)])
    return np.arange(columns)


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(3, 390, (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("kind", ["tied", "mistral", "qwen2", "phi3"])
def test_an_order_that_folds_away_changes_nothing(kind: str, run_main: Run, tmp_path: Path) -> None:
    config = transformers.Phi3Config(**SIZES) if kind == "phi3" else config_of(kind)
    folder = write(tmp_path / "checkpoint", config, order=foldable)
    file = to_gguf(run_main, folder, tmp_path / "a.gguf", "--type", "F32")
    got, expected = logits(read_gguf(file)), logits(harness.load(folder))
    assert (got - expected).abs().max() < 1e-5
    plain = logits(harness.load(write(tmp_path / "plain", config)))
    assert (expected - plain).abs().max() > 0.1  # the order does matter


def across_heads(name: str, columns: int) -> np.ndarray:
    return np.roll(np.arange(columns), 1) if name.endswith("o_proj") else np.arange(columns)


def one_head_alone(name: str, columns: int) -> np.ndarray:
    order = np.arange(columns)
    if name.endswith("o_proj"):
        order[:2] = 1, 0
    return order


@pytest.mark.parametrize(
    ("config", "order", "message"),
    [
        (
            lambda: config_of("tied"),
            lambda name, columns: np.arange(columns)[::-1].copy(),
            "the columns of model.layers.0.self_attn.q_proj were reordered: this format has groups of neigh",
        ),
        (
            lambda: config_of("tied"),
            across_heads,
            "o_proj moves columns from one head to another",
        ),
        (lambda: config_of("tied"), one_head_alone, "o_proj differs between heads that share their values"),
        # Between its gate and its down_proj lies a norm.
        (
            lambda: transformers.BitNetConfig(**SIZES),
            foldable,
            "the columns of model.layers.0.self_attn.o_proj were reordered",
        ),
    ],
)
def test_other_orders_are_refused_with_the_reason(
    config: Callable[[], Any],
    order: Callable[[str, int], np.ndarray],
    message: str,
    run_main: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = write(tmp_path / "checkpoint", config(), order=order), tmp_path / "out"
    assert run_main(export_main, folder, "--format", "hqq", "--out", out) == EXIT_USAGE
    assert message in capsys.readouterr().err
    assert not out.exists()
