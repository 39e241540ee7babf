"""Folders for mlx_lm in mlx_lm, against the checkpoint in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import harness
from harness.export.mlx import EIGHT_BITS, export_mlx
from tests.harness.export.checkpoints import byte_level, without_shift, write
from tests.runtimes import models

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")

PROMPT = list(range(20, 75))
# Logits, whose standard deviation is 0.3 here; without a shift nothing is rounded.
FLOAT32 = 2e-5


def logits(folder: Path, prompt: list[int]) -> tuple[np.ndarray, np.ndarray, Any]:
    """What mlx_lm computes from an export, and the exact logits of a checkpoint beside it.

    Two computations in float32 would each add an error of their own, so harness.load is held to the exact
    logits too.
    """
    model, _ = mlx_lm.load(str(folder / "mlx"))
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        ours = harness.load(folder / "checkpoint")(tokens).logits[0].double().numpy()
        exact = harness.load(folder / "checkpoint", dense=True).to(torch.float64)(tokens).logits[0].numpy()
    assert np.abs(ours - exact).max() < FLOAT32
    assert exact.std() > 0.2
    return np.array(model(mx.array([prompt])).astype(mx.float32))[0], exact, model


@pytest.mark.parametrize("name", [*models.CONFIGS, *models.MLX])
def test_every_architecture_computes_what_the_checkpoint_does(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", (models.CONFIGS | models.MLX)[name](), change=without_shift)
    export_mlx(folder, tmp_path / "mlx")
    got, expected, _ = logits(tmp_path, PROMPT)
    assert np.abs(got - expected).max() < FLOAT32
    assert np.array_equal(got.argmax(axis=-1), expected.argmax(axis=-1))


@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
def test_a_shift_costs_one_rounding(block_size: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", models.CONFIGS["llama"](), block_size=block_size)
    export_mlx(folder, tmp_path / "mlx")
    got, expected, _ = logits(tmp_path, PROMPT)
    assert np.abs(got - expected).max() < 4e-3


def test_an_embedding_in_8_bits_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", models.CONFIGS["qwen3"](), change=without_shift)
    export_mlx(folder, tmp_path / "mlx", embedding=EIGHT_BITS)
    got, expected, model = logits(tmp_path, PROMPT)
    assert model.model.embed_tokens.bits == 8
    assert 0 < np.abs(got - expected).max() < 0.1


def test_a_bfloat16_model_is_computed_in_float32(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "checkpoint", models.CONFIGS["llama"](), dtype=torch.bfloat16, change=without_shift
    )
    export_mlx(folder, tmp_path / "mlx")
    model, _ = mlx_lm.load(str(tmp_path / "mlx"))
    assert model(mx.array([PROMPT])).dtype == mx.float32


def test_the_text_that_follows_is_the_checkpoint_s(tmp_path: Path) -> None:
    tokenizer = byte_level()
    folder = write(tmp_path / "checkpoint", models.CONFIGS["qwen3"](), tokenizer, change=without_shift)
    export_mlx(folder, tmp_path / "mlx")
    words = "They're here in 1984, foxes jump: it's 3.14"
    tokens = tokenizer(words, return_tensors="pt").input_ids
    ours = harness.load(folder).generate(tokens, max_new_tokens=16, do_sample=False)[0, tokens.shape[1] :]
    model, own = mlx_lm.load(str(tmp_path / "mlx"))
    assert mlx_lm.generate(model, own, words, max_tokens=16) == tokenizer.decode(ours)
