"""A checkpoint is refused where `harness.hf` was not imported, with a message that says what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import harness
from harness.models.folder import INDEX
from harness.ternary.notice import ENTRY, add_notice

WHAT_TO_DO = "run `import harness.hf` before from_pretrained"
PROMPT = torch.tensor([[3, 7, 11, 5]])

# Tries every way into every folder, in a process that knows nothing of this package.
ELSEWHERE = """
import json, sys
import transformers

ways = {
    "AutoModelForCausalLM": transformers.AutoModelForCausalLM.from_pretrained,
    "AutoModel": transformers.AutoModel.from_pretrained,
    "LlamaForCausalLM": transformers.LlamaForCausalLM.from_pretrained,
    "pipeline": lambda folder: transformers.pipeline("text-generation", model=folder),
}
outcomes = {}
for folder in sys.argv[1:]:
    for way, load in ways.items():
        try:
            load(folder)
            outcomes[f"{folder} {way}"] = "loaded"
        except Exception as error:
            outcomes[f"{folder} {way}"] = f"{type(error).__name__}: {error}"
assert not any(name.partition(".")[0] in ("harness", "reference") for name in sys.modules)
print(json.dumps(outcomes))
"""


def outcomes_elsewhere(*folders: Path) -> dict[str, dict[str, str]]:
    """What each way of loading gives, by folder name and way."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", ELSEWHERE, *(folder.name for folder in folders)]
    run = subprocess.run(
        command, cwd=folders[0].parent, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, dict[str, str]] = {folder.name: {} for folder in folders}
    for key, outcome in json.loads(run.stdout).items():
        folder, way = key.split()
        found[folder][way] = outcome
    return found


def as_version_1(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    del config[ENTRY]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_transformers_alone_refuses_every_checkpoint_and_says_what_to_do(plain: Path, tmp_path: Path) -> None:
    """As quantization writes it, as a model saves it, and of version 1 once it is saved again."""
    fresh, old = (shutil.copytree(plain, tmp_path / name) for name in ("fresh", "old"))
    saved = [tmp_path / name for name in ("single", "sharded", "moved")]
    model = harness.load(fresh)
    model.save_pretrained(saved[0])
    model.save_pretrained(saved[1], max_shard_size="100KB")
    assert (saved[1] / INDEX).exists()
    harness.load(as_version_1(old)).save_pretrained(saved[2])
    for folder in saved:
        for file in fresh.glob("tokenizer*"):
            shutil.copy(file, folder)
    dequantized = tmp_path / "dequantized"
    assert not hasattr(model.dequantize().config, ENTRY)
    model.save_pretrained(dequantized)
    for file in fresh.glob("tokenizer*"):
        shutil.copy(file, dequantized)

    outcomes = outcomes_elsewhere(fresh, *saved, dequantized, old)
    for folder in (fresh, *saved):
        assert len(outcomes[folder.name]) == 4
        for outcome in outcomes[folder.name].values():
            assert "ValueError" in outcome
            assert WHAT_TO_DO in outcome
    assert set(outcomes["dequantized"].values()) == {"loaded"}
    # Why there is a version 2.
    assert set(outcomes["old"].values()) == {"loaded"}


def test_after_the_import_every_way_loads_the_same_weights(plain: Path, tmp_path: Path) -> None:
    expected = harness.load(plain)(PROMPT).logits
    old = as_version_1(shutil.copytree(plain, tmp_path / "old"))
    for folder in (plain, old):
        assert torch.equal(LlamaForCausalLM.from_pretrained(folder)(PROMPT).logits, expected)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(PROMPT).logits, expected)
    pipeline = transformers.pipeline("text-generation", model=str(plain))
    assert torch.equal(pipeline.model(PROMPT).logits, expected)


def test_a_checkpoint_whose_quantization_config_was_deleted_is_still_refused(
    plain: Path, tmp_path: Path
) -> None:
    """transformers says in a warning that it may be deleted."""
    folder = shutil.copytree(plain, tmp_path / "deleted")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=WHAT_TO_DO):
        AutoModelForCausalLM.from_pretrained(folder)


def test_the_decoder_of_a_model_with_a_vision_tower_is_refused_too(tmp_path: Path) -> None:
    config = transformers.Gemma3Config()
    config.quantization_config = {"quant_method": "pt2_llm"}
    add_notice(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=WHAT_TO_DO):
        transformers.Gemma3ForCausalLM.from_pretrained(tmp_path)


def test_a_file_that_a_plain_config_names_is_read(llama: Path, tmp_path: Path) -> None:
    """The entry belongs to transformers: for other models it names the file of the weights."""
    folder = shutil.copytree(llama, tmp_path / "named")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, ENTRY: "consolidated.safetensors"}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = AutoModelForCausalLM.from_pretrained(llama)
    assert torch.equal(model(PROMPT).logits, expected(PROMPT).logits)
    model.save_pretrained(tmp_path / "again")
    assert ENTRY not in json.loads((tmp_path / "again" / "config.json").read_text())
