"""Tensors that models compute and no file holds: masks, tables of positions, factors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import harness
import harness.hf
from harness.models.loading import load_original
from harness.quantize.options import Options
from harness.quantize.run import quantize
from harness.ternary.linear import TernaryLinear
from reference.types import TernaryConfig
from tests.harness import tiny
from tests.harness.export.checkpoints import code_cache


@pytest.fixture(autouse=True)
def memory_is_filled() -> Iterator[None]:
    """What is left uninitialized holds NaN, or the largest integer, and no value of an earlier table."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def by_layers(folder: Path, trust_remote_code: bool = False) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
        original = load_original(str(folder), trust_remote_code=trust_remote_code)
    assert original.read is not None
    return original.model


ORIGINAL: dict[str, Callable[..., Any]] = {
    "whole": lambda folder, **more: load_original(str(folder), **more).model,
    "layer by layer": by_layers,
}
TERNARY: dict[str, Callable[..., Any]] = {
    "load": harness.load,
    "load with dense weights": lambda folder, **more: harness.load(folder, dense=True, **more),
    "from_pretrained": transformers.AutoModelForCausalLM.from_pretrained,
}


def ternarize(original: Path, folder: Path, **more: Any) -> Path:
    (folder / "words.txt").write_text(tiny.words(400))
    options = Options(
        model=str(original),
        out=folder / "ternary",
        backend="reference",
        embedding="int8",
        calibration=str(folder / "words.txt"),
        nsamples=2,
        seqlen=24,
        config=TernaryConfig(block_size=tiny.BLOCK),
        **more,
    )
    quantize(options, say=lambda line: None)
    return folder / "ternary"


@pytest.fixture(scope="module", params=sorted(tiny.CONFIGS))
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its checkpoint, with embedding and head in 8 bits."""
    folder = tmp_path_factory.mktemp(request.param)
    original = tiny.save(tiny.make_model(request.param), folder / "original")
    return original, ternarize(original, folder)


@pytest.mark.parametrize("way", [*ORIGINAL, *TERNARY])
def test_what_no_file_holds_is_what_the_config_says(way: str, folders: tuple[Path, Path]) -> None:
    original, ternary = folders
    model = ORIGINAL[way](original) if way in ORIGINAL else TERNARY[way](ternary)
    expected = tiny.tables(transformers.AutoConfig.from_pretrained(original))
    for name, table in expected.items():
        found = model.get_buffer(name)
        assert torch.equal(found, table.to(found.dtype)), name


@pytest.mark.parametrize("way", TERNARY)
def test_nothing_of_loading_is_left_in_a_loaded_model(way: str, folders: tuple[Path, Path]) -> None:
    model = TERNARY[way](folders[1])
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    for layer in model.modules():
        if isinstance(layer, TernaryLinear):
            assert (layer.dense is None) == (way != "load with dense weights")
            assert layer.weight.shape == (layer.out_features, layer.in_features)
            assert "weight" not in vars(layer)


OWN_CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("factor", torch.tensor(0.5), persistent=False)
        for index, layer in enumerate(self.model.layers):
            layer.register_buffer("table", torch.arange(index, index + 4), persistent=False)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A model whose code fills tables when it is made, as with earlier versions of transformers."""
    folder = tmp_path_factory.mktemp("own")
    original = tiny.save(tiny.make_model("llama"), folder / "original")
    (original / "own.py").write_text(OWN_CODE)
    config = json.loads((original / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config.update(model_type="own", architectures=["OwnForCausalLM"], auto_map=classes)
    (original / "config.json").write_text(json.dumps(config))
    with code_cache(folder / "modules"):
        yield original, ternarize(original, folder, trust_remote_code=True)


@pytest.mark.parametrize("way", [*ORIGINAL, *TERNARY])
def test_tables_of_code_that_comes_with_a_model_are_computed(way: str, own: tuple[Path, Path]) -> None:
    model = (ORIGINAL[way] if way in ORIGINAL else TERNARY[way])(own[way in TERNARY], trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert model.factor == 0.5
    for index, layer in enumerate(model.model.layers):
        assert layer.table.tolist() == [index, index + 1, index + 2, index + 3]
    name = "model.rotary_emb.inv_freq"
    assert torch.equal(model.get_buffer(name), tiny.tables(tiny.CONFIGS["llama"]())[name])
