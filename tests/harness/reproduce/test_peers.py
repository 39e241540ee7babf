"""Other people's quantizers: stand-ins for all, and the packages themselves where they are installed."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from harness.calibration.methods import two_bits
from harness.cli import EXIT_USAGE
from harness.models.loading import load_original
from harness.reproduce import cells, peers
from harness.reproduce.__main__ import main as reproduce_main
from harness.reproduce.cells import Cells
from tests.harness import tiny

Run = Callable[..., int]

ROOT = Path(cells.__file__).parents[2]

AUTO_ROUND = """
import torch, transformers
class AutoRound:
    def __init__(self, model, *, scheme, group_size, sym, dataset, iters, seqlen, nsamples, **rest):
        assert (scheme, group_size, sym, iters, seqlen, nsamples) == ("W2A16", 128, False, 7, 24, 8)
        assert [tuple(row["input_ids"].shape) for row in dataset] == [(1, 24)] * 8
        self.source = model
    def quantize_and_save(self, out, format):
        assert format == "fake"
        model = transformers.AutoModelForCausalLM.from_pretrained(self.source)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.zero_()
        model.save_pretrained(out)
        transformers.AutoTokenizer.from_pretrained(self.source).save_pretrained(out)
"""
# With the package's own rule for its workers, which is refused with one of them.
GPTQMODEL = """
import os, shutil
workers = int(os.getenv("GPTQMODEL_CPU_WORKERS") or (os.cpu_count() + 1) // 2)
class QuantizeConfig(dict):
    pass
class GPTQModel:
    @classmethod
    def load(cls, source, config, dtype):
        assert workers >= 2
        assert (config["bits"], config["group_size"], config["sym"]) == (2, 128, False)
        model = cls()
        model.source = source
        return model
    def quantize(self, rows, batch_size):
        open("gptq.log", "w").close()
        assert [tuple(row["input_ids"].shape) for row in rows] == [(1, 24)] * 8
    def save(self, out):
        shutil.copytree(self.source, out)
"""
MODEL_DEQUANT = """
import torch, transformers
def dequantize_model(packed, out, target_dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(packed)
    assert model.dtype == target_dtype
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(packed).save_pretrained(out)
"""
# transformers imports Quantizer itself where the package is installed.
HQQ = """
Quantizer = None
def BaseQuantizeConfig(nbits, group_size, axis):
    assert (nbits, group_size, axis) == (2, 64, 1)
class HQQLinear:
    def __init__(self, linear, config, **rest):
        self.weight = linear.weight
    def dequantize(self):
        return 0.5 * self.weight
"""
STAND_INS = {
    "auto-round": {"auto_round.py": AUTO_ROUND},
    "gptqmodel": {
        "gptqmodel/__init__.py": GPTQMODEL,
        "gptqmodel/utils/__init__.py": "",
        "gptqmodel/utils/model_dequant.py": MODEL_DEQUANT,
    },
    "hqq": {"hqq/__init__.py": "", "hqq/core/__init__.py": "", "hqq/core/quantize.py": HQQ},
}
# A layer of the model has 736 rows of 128 weights and 128 of 176. For each 128 of a row, or what is left of
# it, there are a 16-bit step and a 2-bit zero point. HQQ's groups of 64 run on
# from row to row, each with two 16-bit numbers.
GPTQ_BITS = 2 + 18 * (736 + 2 * 128) / (736 * 128 + 128 * 176)
BITS = {"auto-round": GPTQ_BITS, "gptqmodel": GPTQ_BITS, "hqq": 2 + 32 / 64}


@pytest.fixture
def arguments(random_llama: Path, words_file: Path) -> tuple[object, ...]:
    sizes = ("--samples", "8", "--seqlen", "24", "--eval-seqlen", "24", "--eval-windows", "3")
    return ("--model", random_llama, "--calibration", words_file, "--eval", words_file, *sizes)


def write_package(folder: Path, name: str) -> None:
    for file, content in STAND_INS[name].items():
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
    metadata = folder / f"{name.replace('-', '_')}-9.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_runs_in_a_process_of_its_own_and_is_measured_by_the_same_code(
    name: str,
    tmp_path: Path,
    arguments: tuple[object, ...],
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_package(tmp_path, name)
    before = os.listdir()
    module = peers.PEERS[name].module
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    real = Cells._quality

    def quality(self: Cells, cell: cells.Cell) -> dict[str, Any]:
        if cell.method in (name, "original"):
            return real(self, cell)
        return {"texts": {}, "bits_per_weight": 2.0}

    monkeypatch.setattr(Cells, "_quality", quality)
    trained = ("--peer-iterations", "7") if peers.PEERS[name].trains else ()
    command = ("table1", *arguments, "--peers", name, *trained, "--out", tmp_path / "out")
    assert run_main(reproduce_main, *command) == 0
    rows = json.loads((tmp_path / "out" / "reproduce.json").read_text())["results"]["table1"]["rows"]
    original, *_, peer, _, _ = [row for row in rows if "method" in row]
    assert peer["method"] == name
    assert peer["bits_per_weight"] == pytest.approx(BITS[name], abs=1e-3)
    (text,) = peer["texts"].values()
    assert text["mean"] > 0
    assert text["perplexity"] != next(iter(original["texts"].values()))["perplexity"]
    assert module not in sys.modules
    assert os.listdir() == before
    assert not (tmp_path / "out" / "unfinished").exists()


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_that_is_not_installed_is_refused_before_anything_is_measured(
    name: str,
    tmp_path: Path,
    arguments: tuple[object, ...],
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Cells, "_quality", lambda self, cell: asked.append(cell.method))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run_main(reproduce_main, "table1", *arguments, "--peers", name, "--out", tmp_path) == EXIT_USAGE
    assert f"--peers {name} requires the package `{name}`" in capsys.readouterr().err
    assert asked == []


@pytest.mark.parametrize("name", peers.PEERS)
def test_only_a_peer_that_trains_is_measured_again_after_more_iterations(
    name: str, tmp_path: Path, random_llama: Path, words_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: "9.9")
    text = (str(words_file),)
    keys = []
    for steps in (1, 2):
        settings = cells.Settings(str(random_llama), text, text, peer_iterations=steps)
        keys.append(Cells(tmp_path, settings).key(cells.Cell(name, 8, text[0])))
    assert (keys[0] == keys[1]) == (name != "auto-round")


def test_the_last_group_of_a_row_costs_as_much_as_a_full_one() -> None:
    # SmolLM2's rows: 576 weights are 4.5 groups, 1536 are 12.
    assert two_bits([(576, 576)], 128) == (576 * 2 + 5 * 18) / 576
    both = two_bits([(576, 576), (10, 1536)], 128)
    bits = 576 * (576 * 2 + 5 * 18) + 10 * (1536 * 2 + 12 * 18)
    assert both == pytest.approx(bits / (576 * 576 + 10 * 1536), rel=1e-14)
    assert two_bits([(3, 128)], 64, shared=32) == 2.5


@pytest.mark.parametrize("name", peers.PEERS)
def test_what_a_package_writes_holds_at_most_four_values_a_group(name: str, tmp_path: Path) -> None:
    """So its bits are counted truly: the last group of a row of 192 is half as long."""
    peer = peers.PEERS[name]
    if importlib.util.find_spec(peer.module) is None:
        pytest.skip(f"{peer.package} is not installed")
    config = transformers.LlamaConfig(
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=tiny.VOCABULARY,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    original = load_original(str(tiny.save(model, tmp_path / "model")))
    windows = torch.randint(3, tiny.VOCABULARY, (8, 64))
    (tmp_path / "work").mkdir()
    folder = peers.quantize_by(peer, original, windows, 1, tmp_path / "work")
    quantized = dict(load_original(str(folder)).model.named_parameters())
    for key, weight in original.model.named_parameters():
        found = quantized[key]
        assert found.dtype == weight.dtype
        if not key.endswith("_proj.weight"):
            assert torch.equal(found, weight), key
            continue
        assert not torch.equal(found, weight)
        for row in (found.reshape(1, -1) if name == "hqq" else found).tolist():
            for start in range(0, len(row), peer.group):
                assert len(set(row[start : start + peer.group])) <= 4, key
