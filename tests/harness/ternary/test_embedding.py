"""Embedding and head in 8 bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import harness
import harness.hf
from harness.errors import UserError
from harness.quantize.options import Options
from harness.quantize.run import quantize
from harness.ternary.embedding import decode, encode, round_embeddings, unrounded
from harness.ternary.reading import tensors_of, weight_map
from reference.types import TernaryConfig
from tests.harness import tiny

PROMPT = torch.tensor([[3, 7, 11, 5]])


def test_every_weight_goes_to_the_nearest_code_of_its_row() -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    weight[2], weight[3] = 0, weight[3] * 1e-6
    parts = encode(weight)
    assert parts["weight"].dtype == torch.int8
    assert parts["weight"].abs().amax(1).tolist() == [127, 127, 0, 127, 127, 127, 127]
    error = (decode(**parts, dtype=torch.float32) - weight).abs()
    # Half a step, and the rounding of the product to float32.
    assert (error <= parts["row_factor"][:, None] * (0.5 + 127 * 2**-23)).all()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "opt"])
def test_tied_matrices_are_coded_once(kind: str) -> None:
    model = tiny.make_model(kind, torch.bfloat16, ternary=False)
    before = model.get_input_embeddings().weight.data.clone()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    coded = round_embeddings(model)
    assert len(coded) == (1 if tied else 2)
    after = model.get_input_embeddings().weight.data
    assert not torch.equal(after, before)
    with unrounded(coded):
        assert torch.equal(model.get_input_embeddings().weight.data, before)
    assert torch.equal(model.get_input_embeddings().weight.data, after)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_is_read_back_is_what_calibration_used(kind: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.make_model(kind, torch.bfloat16, ternary=False), tmp_path / "original")
    options = options_for(folder, tmp_path, evaluation=str(tmp_path / "words.txt"), evaluation_seqlen=24)
    report = quantize(options, say=lambda line: None)
    whole = quantize(
        Options(**{**vars(options), "embedding": "as-it-is", "out": tmp_path / "whole"}),
        say=lambda line: None,
    )
    assert report["perplexity"]["before"] == whole["perplexity"]["before"]
    original = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    round_embeddings(original)
    loaded = harness.load(tmp_path / "out")
    for name in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(loaded, name)().weight, getattr(original, name)().weight)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == original.config.tie_word_embeddings
    tensors = dict(tensors_of(tmp_path / "out"))
    coded = [name for name, tensor in tensors.items() if "proj" not in name and tensor.dtype == torch.int8]
    assert len(coded) == (1 if tied else 2)
    announced = report["plan"]["packed_bytes"] + report["plan"]["other_bytes"]
    assert announced == sum(tensor.nbytes for tensor in tensors.values())

    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(wide.get_input_embeddings().weight, loaded.get_input_embeddings().weight.float())

    loaded.save_pretrained(tmp_path / "again")
    saved = dict(tensors_of(tmp_path / "again"))
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert torch.equal(again(PROMPT).logits, loaded(PROMPT).logits)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["coded"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_changing_the_dtype_leaves_what_is_stored_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny.make_model("qwen3", torch.bfloat16, ternary=False)
    quantize(options_for(tiny.save(model, tmp_path / "original"), tmp_path), say=lambda line: None)
    loaded = harness.load(tmp_path / "out").to(dtype)
    assert loaded.get_input_embeddings().weight.dtype == dtype
    loaded.save_pretrained(tmp_path / "again")
    tensors, saved = (dict(tensors_of(tmp_path / name)) for name in ("out", "again"))
    for name in ("model.embed_tokens", "lm_head"):
        for part in ("weight", "row_factor"):
            assert tensors[f"{name}.{part}"].dtype == saved[f"{name}.{part}"].dtype
            assert torch.equal(tensors[f"{name}.{part}"], saved[f"{name}.{part}"])


def test_rows_that_have_changed_are_saved_as_they_are(tmp_path: Path) -> None:
    """And all others as they were: a model is given more tokens, and one has another embedding."""
    model = tiny.make_model("qwen3", torch.bfloat16, ternary=False)
    assert not model.config.tie_word_embeddings
    quantize(options_for(tiny.save(model, tmp_path / "original"), tmp_path), say=lambda line: None)
    loaded = harness.load(tmp_path / "out")
    before = loaded.get_input_embeddings().weight.data.clone()
    loaded.resize_token_embeddings(len(before) + 8)
    for module in (loaded.get_input_embeddings(), loaded.get_output_embeddings()):
        module.weight.data[3] = torch.linspace(-1, 1, module.weight.shape[1])
    # As methods that train an embedding do.
    head = torch.nn.Linear(
        *loaded.get_output_embeddings().weight.shape[::-1], bias=False, dtype=torch.bfloat16
    )
    loaded.set_output_embeddings(head)
    loaded.save_pretrained(tmp_path / "again")
    again = harness.load(tmp_path / "again")
    for was, now in (
        (loaded.get_input_embeddings().weight, again.get_input_embeddings().weight),
        (head.weight, again.get_output_embeddings().weight),
    ):
        assert now.shape == was.shape
        step = was.abs().amax(1, keepdim=True).float() / 127
        assert ((now - was).float().abs() <= step * (0.5 + 2**-2)).all()  # 127 steps are rounded to bfloat16
    kept = torch.tensor([row for row in range(len(before)) if row != 3])
    assert torch.equal(again.get_input_embeddings().weight[kept], before[kept])


def test_codes_are_checked(tmp_path: Path) -> None:
    options = options_for(tiny.save(tiny.make_model("llama"), tmp_path / "original"), tmp_path)
    quantize(options, say=lambda line: None)
    name = "model.embed_tokens.weight"
    file = tmp_path / "out" / weight_map(tmp_path / "out")[name]
    tensors = load_file(file)
    tensors[name][5, 6] = -128
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is damaged: it has a code beyond ±127"):
        harness.load(tmp_path / "out")
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is bfloat16 .*, expected int8"):
        harness.load(tmp_path / "out")


def options_for(folder: Path, tmp_path: Path, **more: object) -> Options:
    words = tmp_path / "words.txt"
    words.write_text(tiny.words(400))
    return Options(
        model=str(folder),
        out=tmp_path / "out",
        backend="reference",
        embedding="int8",
        calibration=str(words),
        nsamples=8,
        seqlen=24,
        config=TernaryConfig(block_size=tiny.BLOCK),
        **more,
    )
