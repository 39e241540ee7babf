"""The decoder layers are those that text goes through, whatever else a model holds."""

from __future__ import annotations

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
from tests.harness import tiny, wrappers
from tests.harness.quantize.test_quantize import run_workflow

LAYERS = {
    **dict.fromkeys(tiny.CONFIGS, "model.layers"),
    "opt": "model.decoder.layers",
    **dict.fromkeys(("codegen", "gptj", "gpt_neo"), "transformer.h"),
}


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


@pytest.mark.parametrize("kind", wrappers.WITH_VISION)
def test_a_vision_tower_heavier_than_the_decoder_is_not_the_decoder(kind: str) -> None:
    model = wrappers.with_vision(kind)
    decoder = model.get_submodule(wrappers.WITH_VISION[kind])
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    assert max(map(size, lists)) > size(decoder)
    assert locate_layers(model).layers is decoder


def test_a_multimodal_model_is_ternarized(words_file: Path, tmp_path: Path) -> None:
    model = wrappers.with_vision("git")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run_workflow(model, tmp_path / "out", words_file, TernaryConfig(block_size=tiny.BLOCK))
    stored = dict(tensors_of(tmp_path / "out"))
    packed = {name.removesuffix(".trits") for name in stored if name.endswith(".trits")}
    assert len(packed) == 2 * 6
    assert all(name.startswith("git.encoder.layer.") for name in packed)
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in packed:
            assert torch.equal(stored[name], tensor), name
    tokens = torch.tensor([[3, 7, 11, 5]])
    assert torch.equal(harness.load(tmp_path / "out", dense=True)(tokens).logits, model(tokens).logits)


def test_a_multimodal_model_is_read_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(wrappers.with_vision("git"), tmp_path)
    monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    original = load_original(str(tmp_path))
    decoder = locate_layers(original.model, original.read)
    assert decoder.prefix == "git.encoder.layer"
    assert len(decoder.layers) == 2
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

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> torch.Tensor:
        states = self.embedding(input_ids)
        for layer in self.small:
            states = layer(states)
        return states


class FailsAfterwards(TwoLists):
    """Wants an image as well, once it has seen the text."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> torch.Tensor:
        super().forward(input_ids)
        raise ValueError("pixel_values are missing")


class FailsAtOnce(TwoLists):
    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> torch.Tensor:
        raise ValueError("pixel_values are missing")


class LooksAnyway(TwoLists):
    """Runs a blank image where there is none."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> torch.Tensor:
        for layer in self.large:
            layer(torch.zeros(1, 7, 32))
        return super().forward(input_ids)


@pytest.mark.parametrize("kind", [TwoLists, FailsAfterwards, LooksAnyway])
def test_of_two_lists_the_one_with_text_is_chosen(kind: type[nn.Module]) -> None:
    model = kind()
    assert locate_layers(model).prefix == "small"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_that_reads_no_text_alone_is_refused_with_its_reason() -> None:
    with pytest.raises(UserError, match=r"any list of layers of FailsAtOnce.*pixel_values are missing"):
        locate_layers(FailsAtOnce())


class Ignores(transformers.LlamaForCausalLM):
    """Its layers read text; its logits do not depend on them."""

    def forward(self, **inputs: Any) -> Any:
        found = super().forward(**inputs)
        found.logits = torch.zeros_like(found.logits)
        return found


def test_layers_whose_output_is_in_no_logit_are_refused() -> None:
    model = Ignores(tiny.CONFIGS["llama"]())
    decoder = locate_layers(model)
    with pytest.raises(UserError, match=r"the logits of Ignores do not depend on model.layers"):
        capture_inputs(model, decoder, torch.tensor([[1, 2, 3]]))


def test_layers_that_text_does_not_reach_are_refused() -> None:
    model = TwoLists()
    decoder = DecoderLayers("large", model.large, [{}, {}])
    with pytest.raises(UserError, match="text does not go through large of TwoLists"):
        capture_inputs(model, decoder, torch.tensor([[1, 2, 3]]))
