"""A head of its own in a model whose config says that it is the embedding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import harness
import harness.hf
from harness.quantize.options import Options
from harness.quantize.run import quantize
from reference.types import TernaryConfig
from tests.harness import tiny

KINDS = ["llama", "opt"]
HEADS = ["random", "double"]
STORED = ["int8", "as-it-is"]


def codes(seed: int) -> torch.Tensor:
    """A matrix that 8 bits a weight and a factor a row hold exactly."""
    values = torch.randint(-127, 128, (tiny.VOCABULARY, tiny.WIDTH), generator=torch.manual_seed(seed))
    values[:, 0] = 127
    return (values * 2.0**-12).bfloat16()


def original(folder: Path, kind: str, head: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Write a model of which transformers says that its config is wrong; return embedding and head."""
    model = tiny.make_model(kind)
    assert model.config.tie_word_embeddings
    embedding = codes(0)
    model.get_input_embeddings().weight.data = embedding
    tiny.save(model, folder)
    own = codes(1) if head == "random" else 2 * embedding  # with the codes of the embedding, if in 8 bits
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": own}, folder / "model.safetensors", metadata={"format": "pt"})
    return embedding, own


def run(folder: Path, stored: str) -> Path:
    (folder / "words.txt").write_text(tiny.words(400))
    options = Options(
        model=str(folder / "original"),
        out=folder / "out",
        backend="reference",
        embedding=stored,
        calibration=str(folder / "words.txt"),
        nsamples=2,
        seqlen=24,
        config=TernaryConfig(block_size=tiny.BLOCK),
    )
    quantize(options, say=lambda line: None)
    return folder / "out"


def assert_weights(model: torch.nn.Module, embedding: torch.Tensor, head: torch.Tensor) -> None:
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_its_own_is_kept_and_the_config_says_so(
    kind: str, head: str, stored: str, tmp_path: Path
) -> None:
    expected = original(tmp_path / "original", kind, head)
    out = run(tmp_path, stored)
    for folder in (out, tmp_path / "again"):
        config = json.loads((folder / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        model = harness.load(folder)
        assert_weights(model, *expected)
        model.tie_weights()  # which reads the config again
        assert_weights(model, *expected)
        assert_weights(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), *expected)
        model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("head", HEADS)
def test_checkpoints_with_the_config_of_the_original_are_read(head: str, stored: str, tmp_path: Path) -> None:
    """Early checkpoints copied what the original says."""
    expected = original(tmp_path / "original", "llama", head)
    out = run(tmp_path, stored)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert_weights(harness.load(out), *expected)


@pytest.mark.parametrize("stored", STORED)
def test_a_head_that_a_loaded_model_is_given_is_saved(stored: str, tmp_path: Path) -> None:
    model = tiny.make_model("llama")
    model.get_input_embeddings().weight.data = codes(0)
    tiny.save(model, tmp_path / "original")
    loaded = harness.load(run(tmp_path, stored))
    assert loaded.config.tie_word_embeddings
    head = torch.nn.Linear(tiny.WIDTH, tiny.VOCABULARY, bias=False, dtype=torch.bfloat16)
    loaded.set_output_embeddings(head)
    loaded.save_pretrained(tmp_path / "again")
    assert_weights(harness.load(tmp_path / "again"), codes(0), head.weight)
