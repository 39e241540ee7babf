"""A ternary model made plain, and the classes that a checkpoint is not for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import harness
import harness.hf
from harness.errors import UserError
from harness.models.loading import load_original
from harness.quantize.options import Options
from harness.quantize.run import quantize
from harness.ternary.linear import TernaryLinear
from reference.types import TernaryConfig
from tests.harness import tiny

PROMPT = torch.tensor([[3, 7, 11, 5]])


@pytest.fixture(scope="module", params=[*sorted(tiny.CONFIGS), "qwen3 int8"])
def ternarized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of every architecture, and one with everything in 8 bits."""
    folder = tmp_path_factory.mktemp("plain")
    kind, _, coded = request.param.partition(" ")
    (folder / "words.txt").write_text(tiny.words(400))
    options = Options(
        model=str(tiny.save(tiny.make_model(kind, ternary=False), folder / "original")),
        out=folder / "out",
        backend="reference",
        embedding=coded or "as-it-is",
        calibration=str(folder / "words.txt"),
        nsamples=2,
        seqlen=24,
        config=TernaryConfig(block_size=tiny.BLOCK, grid=coded or "float16"),
    )
    quantize(options, say=lambda line: None)
    return folder / "out"


@pytest.mark.parametrize("dense", [True, False])
def test_a_dequantized_model_is_a_plain_one(ternarized: Path, dense: bool, tmp_path: Path) -> None:
    model = harness.load(ternarized, dense=dense)
    expected = harness.load(ternarized, dense=True)(PROMPT).logits
    assert model.dequantize() is model
    assert torch.equal(model(PROMPT).logits, expected)
    model.save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)

    # What somebody without this package finds.
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    plain = load_original(str(tmp_path)).model
    fresh = transformers.AutoModelForCausalLM.from_config(plain.config, dtype=torch.bfloat16)
    assert [(name, t.dtype, t.shape) for name, t in model.named_parameters()] == [
        (name, t.dtype, t.shape) for name, t in fresh.named_parameters()
    ]
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in fresh.named_buffers()]
    for other in (model, plain):
        assert not any(type(module).__module__.startswith("harness") for module in other.modules())
        assert not getattr(other, "is_quantized", False)
        assert all(parameter.requires_grad for parameter in other.parameters())
    assert torch.equal(plain(PROMPT).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_is_dequantized_in_another_dtype(quantized: Path, dtype: torch.dtype) -> None:
    wide = transformers.AutoModelForCausalLM.from_pretrained(quantized, dtype=dtype)
    tiny.keep_dense(wide)
    expected = wide(PROMPT).logits
    table = wide.model.rotary_emb.inv_freq.clone()
    for model in (wide.dequantize(), harness.load(quantized).dequantize(dtype=dtype)):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert torch.equal(model.model.rotary_emb.inv_freq, table)
        assert torch.equal(model(PROMPT).logits, expected)


def test_edited_weights_stay_edited(quantized: Path) -> None:
    model = harness.load(quantized, dense=True)
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[3, 5] = 7
    assert model.dequantize().get_submodule(name).weight[3, 5] == 7


@pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForSequenceClassification", "LlamaModel"])
def test_another_class_is_refused_with_what_to_do(kind: str, quantized: Path, tmp_path: Path) -> None:
    loader = getattr(transformers, kind)
    with pytest.raises(UserError, match=r"is for LlamaForCausalLM .*, not for Llama\w+; .*dequantize\(\)"):
        loader.from_pretrained(quantized)
    model = harness.load(quantized, dense=True)
    expected = model.model(PROMPT).last_hidden_state
    model.dequantize().save_pretrained(tmp_path)
    body = loader.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(getattr(body, "model", body)(PROMPT).last_hidden_state, expected)


def test_a_class_made_of_the_right_one_is_not_refused(quantized: Path) -> None:
    class Own(transformers.LlamaForCausalLM):
        pass

    assert isinstance(Own.from_pretrained(quantized).model.layers[0].mlp.up_proj, TernaryLinear)
