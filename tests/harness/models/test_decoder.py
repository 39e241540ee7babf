"""The decoder layers are those that text goes through, whatever else a model holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import harness
from harness.calibration.capture import capture_inputs
from harness.errors import UserError
from harness.models.decoder import DecoderLayers, find_decoder_layers, locate_layers
from harness.models.loading import load_original
from harness.ternary.reading import tensors_of
from reference.types import TernaryConfig
from tests.harness import tiny
from tests.harness.quantize.test_quantize import run_workflow

LAYERS = {
    **dict.fromkeys(tiny.CONFIGS, "model.layers"),
    "opt": "model.decoder.layers",
    **dict.fromkeys(("codegen", "gptj", "gpt_neo"), "transformer.h"),
}
# Larger than the decoders below.
VISION = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
MULTIMODAL: dict[str, tuple[str, Callable[[], Any]]] = {
    "gemma3": (
        "model.language_model.layers",
        lambda: transformers.Gemma3Config(
            text_config=tiny.CONFIGS["gemma3"]().to_dict(),
            vision_config=VISION,
            mm_tokens_per_image=4,
            image_token_index=95,
            boi_token_index=94,
            eoi_token_index=93,
        ),
    ),
    "git": (
        "git.encoder.layer",
        lambda: transformers.GitConfig(
            vision_config=VISION,
            vocab_size=tiny.VOCABULARY,
            hidden_size=tiny.WIDTH,
            intermediate_size=tiny.INNER,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    ),
}


def multimodal(kind: str) -> Any:
    torch.manual_seed(0)
    config = MULTIMODAL[kind][1]()
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("kind", sorted(tiny.CONFIGS))
def test_layers_of_text_models_are_found_without_running_one(kind: str) -> None:
    model = tiny.make_model(kind)
    layers = model.get_submodule(LAYERS[kind])
    for layer in layers:
        layer.register_forward_hook(lambda *arguments: pytest.fail("ran"))
    decoder = locate_layers(model)
    assert decoder.prefix == LAYERS[kind]
    assert decoder.layers is layers


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_a_vision_tower_heavier_than_the_decoder_is_not_the_decoder(kind: str) -> None:
    model = multimodal(kind)
    prefix = MULTIMODAL[kind][0]
    decoder = model.get_submodule(prefix)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    assert max(map(size, lists)) > size(decoder)
    assert locate_layers(model).layers is decoder


def test_a_multimodal_model_is_ternarized(words_file: Path, tmp_path: Path) -> None:
    model = multimodal("git")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run_workflow(model, tmp_path / "out", words_file, TernaryConfig(block_size=tiny.BLOCK))
    stored = dict(tensors_of(tmp_path / "out"))
    packed = {name.removesuffix(".trits") for name in stored if name.endswith(".trits")}
    assert len(packed) == 3 * 6
    assert all(name.startswith("git.encoder.layer.") for name in packed)
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in packed:
            assert torch.equal(stored[name], tensor), name
    tokens = torch.tensor([[3, 7, 11, 5]])
    assert torch.equal(harness.load(tmp_path / "out", dense=True)(tokens).logits, model(tokens).logits)


def test_a_multimodal_model_is_read_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(multimodal("git"), tmp_path)
    monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    original = load_original(str(tmp_path))
    decoder = locate_layers(original.model, original.read)
    assert decoder.prefix == "git.encoder.layer"
    assert len(decoder.layers) == 3
    on_disk = {name for name, parameter in original.model.named_parameters() if parameter.is_meta}
    assert on_disk == {f"git.encoder.layer.{name}" for name, _ in decoder.layers.named_parameters()}


def test_matrices_that_layers_share_stay_as_they_are() -> None:
    """As the blocks of Zamba2, which serve at several depths."""
    model = tiny.make_model("llama")
    layers = model.model.layers
    layers[2].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    decoder = find_decoder_layers(model)
    shared = {f"model.layers.{index}.mlp.down_proj" for index in (0, 2)}
    assert not shared & decoder.named_linears().keys()
    assert len(decoder.named_linears()) == 3 * 7 - 2
    assert decoder.not_understood().keys() == {f"{name}.weight" for name in shared}
    with pytest.raises(UserError, match=r"or shared by layers: model\.layers\.0\.mlp\.down_proj\.weight"):
        find_decoder_layers(model, strict=True)


class TwoLists(nn.Module):
    """Text goes through `small`; `large` is for something else."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.large = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
        self.small = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, tokens: torch.Tensor, use_cache: bool = True) -> torch.Tensor:
        states = self.embedding(tokens)
        for layer in self.small:
            states = layer(states)
        return states


class FailsAfterwards(TwoLists):
    """Wants an image as well, once it has seen the text."""

    def forward(self, tokens: torch.Tensor, use_cache: bool = True) -> torch.Tensor:
        super().forward(tokens)
        raise ValueError("pixel_values are missing")


class FailsAtOnce(TwoLists):
    def forward(self, tokens: torch.Tensor, use_cache: bool = True) -> torch.Tensor:
        raise ValueError("pixel_values are missing")


@pytest.mark.parametrize(
    ("kind", "prefix"), [(TwoLists, "small"), (FailsAfterwards, "small"), (FailsAtOnce, "large")]
)
def test_of_two_lists_the_one_with_text_is_chosen_or_the_heavier_if_that_is_unknown(
    kind: type[nn.Module], prefix: str
) -> None:
    model = kind()
    assert locate_layers(model).prefix == prefix
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_that_text_does_not_reach_are_refused() -> None:
    model = TwoLists()
    decoder = DecoderLayers("large", model.large, [{}, {}])
    with pytest.raises(UserError, match="text does not go through large of TwoLists"):
        capture_inputs(model, decoder, torch.tensor([[1, 2, 3]]))
