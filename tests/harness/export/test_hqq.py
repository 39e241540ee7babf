"""Exports in HQQ's layout against the checkpoint's bytes, by HQQ's formula."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import harness
from harness.cli import EXIT_USAGE
from harness.export.__main__ import main as export_main
from harness.export.hqq import export_hqq
from harness.models.tokenizer import load_tokenizer
from tests.harness import tiny
from tests.harness.export.checkpoints import Run, code_cache, config_of, raw, raw_grid, with_own_code, write


def hqq_weight(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """HQQ's formula in float64: digits of four quarters of the groups, the first in the highest bits."""
    packed = tensors[f"{name}.W_q"].int()
    digits = torch.cat([packed >> 6 & 3, packed >> 4 & 3, packed >> 2 & 3, packed & 3])
    grid = (digits - tensors[f"{name}.zero"].double()) * tensors[f"{name}.scale"].double()
    return grid.reshape(*tensors[f"{name}.shape"].tolist())


def test_hqq_holds_the_grid_but_for_the_rounded_zero(plain: Path, run_main: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_main(export_main, plain, "--format", "hqq", "--out", out) == 0
    held = load_file(out / "qmodel.safetensors")
    tensors, modules, _ = raw(plain)
    for name in modules:
        t, alpha, mu = raw_grid(plain, name)
        weight = hqq_weight(held, name)
        constant = alpha == 0
        assert constant.any()
        assert torch.equal(weight[constant], mu[constant])
        zero = (1 - mu / alpha).half().double()
        assert torch.equal(weight[~constant], ((t + 1 - zero) * alpha)[~constant])
        assert held[f"{name}.group_size"] == (32 if name.endswith("down_proj") else 64)
        assert bytes(held[f"{name}.packing"].tolist()) == b"2bit_u8"
    for name in ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(held[name], tensors[name])
    config = json.loads((out / "config.json").read_text())
    assert "transformers_weights" not in config
    settings = config["quantization_config"]
    assert settings["quant_method"] == "hqq"
    assert settings["skip_modules"] == ["lm_head"]
    assert settings["quant_config"]["mlp.down_proj"]["weight_quant_params"]["group_size"] == 32
    assert {entry.name for entry in out.iterdir()} >= {"config.json", "tokenizer.json", "qmodel.safetensors"}


def test_transformers_does_not_fill_an_hqq_export_with_random_weights(plain: Path, tmp_path: Path) -> None:
    export_hqq(plain, tmp_path / "out")
    with pytest.raises((ImportError, OSError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_zero_beyond_float16_makes_a_block_constant(tmp_path: Path) -> None:
    def change(scale: np.ndarray, shift: np.ndarray) -> None:
        scale[1], shift[1] = 2.0**-24, 0.5

    folder = write(tmp_path / "checkpoint", config_of("tied"), change=change)
    exported = export_hqq(folder, tmp_path / "out")
    held = load_file(tmp_path / "out" / "qmodel.safetensors")
    assert (hqq_weight(held, "model.layers.0.mlp.up_proj")[1] == 0.5).all()
    assert exported.rounding.largest == 1
    assert exported.rounding.used <= 1


def test_hqq_takes_models_that_gguf_does_not(run_main: Run, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", tiny.CONFIGS["opt"](), tiny.make_tokenizer())
    assert run_main(export_main, folder, "--format", "hqq", "--out", tmp_path / "out") == 0
    held = load_file(tmp_path / "out" / "qmodel.safetensors")
    name = "model.decoder.layers.1.fc2"
    assert held[f"{name}.group_size"] == 16  # of blocks of 64 in rows of 176
    np.testing.assert_allclose(
        hqq_weight(held, name), harness.load(folder).get_submodule(name).weight.detach(), atol=3e-4
    )
    assert torch.equal(held[f"{name}.bias"], harness.load(folder).get_submodule(name).bias)


def test_code_that_comes_with_a_model_goes_into_the_export(
    plain: Path, run_main: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = with_own_code(plain, tmp_path / "own"), tmp_path / "out"
    assert run_main(export_main, folder, "--format", "hqq", "--out", out) == EXIT_USAGE
    assert "trust_remote_code" in capsys.readouterr().err
    assert not out.exists()
    with code_cache(tmp_path / "modules"):
        assert run_main(export_main, folder, "--format", "hqq", "--out", out, "--trust-remote-code") == 0
    export_hqq(plain, tmp_path / "without")
    held, expected = (load_file(path / "qmodel.safetensors") for path in (out, tmp_path / "without"))
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name]) for name in held)
    for file in ("modeling_own.py", "configuration_own.py"):
        assert (out / file).read_text() == (folder / file).read_text()
    with code_cache(tmp_path / "others"):
        config = transformers.AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert (type(config).__name__, config.hidden_size) == ("OwnConfig", 128)


def test_chat_templates_are_those_of_the_last_export(plain: Path, run_main: Run, tmp_path: Path) -> None:
    """Two templates make transformers write a folder beside the tokenizer."""
    templates = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    several, none = (shutil.copytree(plain, tmp_path / name) for name in ("several", "none"))
    for folder, template in ((several, templates), (none, None)):
        (folder / "chat_template.jinja").unlink()
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    for folder, template in ((several, templates), (several, templates), (none, None)):
        arguments = (folder, "--format", "hqq", "--out", tmp_path / "out", "--force")
        assert run_main(export_main, *arguments) == 0
        assert load_tokenizer(tmp_path / "out").chat_template == template


@pytest.mark.parametrize("weights", ["safetensors", "ternary", "bin", "pt"])
def test_a_folder_of_another_model_is_not_written_into(
    weights: str,
    plain: Path,
    quantized: Path,
    llama: Path,
    run_main: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = shutil.copytree(quantized if weights == "ternary" else llama, tmp_path / "other")
    if weights in ("bin", "pt"):
        name = {"bin": "pytorch_model.bin", "pt": "qmodel.pt"}[weights]
        (out / "model.safetensors").rename(out / name)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert run_main(export_main, plain, "--format", "hqq", "--out", out, "--force") == EXIT_USAGE
    error = capsys.readouterr().err
    assert "contains another model's weights (" in error
    assert "choose another --out" in error
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_folder_without_weights_may_be_written_into(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for _ in range(2):
        export_hqq(plain, tmp_path, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "model.gguf").read_bytes() == b"GGUF"


def test_settings_of_generation_are_those_of_the_last_export(plain: Path, tmp_path: Path) -> None:
    """A model that ends its answers by a token of its own would otherwise never end them."""
    with_some, with_none = (shutil.copytree(plain, tmp_path / name) for name in ("some", "none"))
    settings = {"eos_token_id": [2, 7], "temperature": 0.6, "do_sample": True}
    (with_some / "generation_config.json").write_text(json.dumps(settings))
    (with_none / "generation_config.json").unlink()
    out = tmp_path / "out"
    export_hqq(with_some, out)
    assert json.loads((out / "generation_config.json").read_text()) == settings
    export_hqq(with_none, out, force=True)
    assert not (out / "generation_config.json").exists()


def test_groups_that_hqq_does_not_have_are_refused(
    run_main: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "checkpoint", config_of("tied"), block_size=36)
    assert run_main(export_main, folder, "--format", "hqq", "--out", tmp_path / "out") == EXIT_USAGE
    assert "need groups of 4; HQQ needs a multiple of 8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
