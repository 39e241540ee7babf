"""Tensors that models compute and no file holds: masks, tables of positions, factors."""

from __future__ import annotations

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


@pytest.fixture(autouse=True)
def memory_is_filled() -> Iterator[None]:
    """What is left uninitialized holds NaN, or the largest integer, and no value of an earlier table."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def by_layers(folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
        original = load_original(str(folder))
    assert original.read is not None
    return original.model


ORIGINAL: dict[str, Callable[[Path], Any]] = {
    "whole": lambda folder: load_original(str(folder)).model,
    "layer by layer": by_layers,
}
TERNARY: dict[str, Callable[[Path], Any]] = {
    "load": harness.load,
    "load without dense weights": lambda folder: harness.load(folder, dense=False),
    "from_pretrained": transformers.AutoModelForCausalLM.from_pretrained,
}


@pytest.fixture(scope="module", params=sorted(tiny.CONFIGS))
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its checkpoint, with embedding and head in 8 bits."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "words.txt").write_text(tiny.words(400))
    original = tiny.save(tiny.make_model(request.param), folder / "original")
    options = Options(
        model=str(original),
        out=folder / "ternary",
        backend="reference",
        embedding="int8",
        calibration=str(folder / "words.txt"),
        nsamples=2,
        seqlen=24,
        config=TernaryConfig(block_size=tiny.BLOCK),
    )
    quantize(options, say=lambda line: None)
    return original, folder / "ternary"


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
            assert (layer.weight is None) == (way == "load without dense weights")
            assert layer.weight is layer._buffers["weight"]
