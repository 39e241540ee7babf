"""MLX folders against the checkpoint's bytes; tests/runtimes loads them with mlx_lm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from harness.cli import EXIT_USAGE
from harness.export.__main__ import main as export_main
from tests.harness import tiny
from tests.harness.export.checkpoints import (
    ROPE,
    SIZES,
    WIDE,
    Run,
    config_of,
    raw,
    raw_grid,
    without_shift,
    write,
)


def words(tensor: torch.Tensor, bits: int) -> np.ndarray:
    """Digits of words, the first in the lowest bits."""
    held = tensor.numpy().view(np.uint32)[..., None]
    return (held >> np.arange(0, 32, bits, dtype=np.uint32) & (2**bits - 1)).reshape(len(held), -1)


def to_mlx(run_main: Run, folder: Path, out: Path, *arguments: object) -> tuple[Any, Any]:
    assert run_main(export_main, folder, "--format", "mlx", "--out", out, *arguments) == 0
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("change", [without_shift, lambda scale, shift: None])
def test_words_and_scales_are_what_the_formula_says(
    change: Callable[..., None], run_main: Run, tmp_path: Path
) -> None:
    folder = write(tmp_path / "checkpoint", config_of("untied"), change=change)
    tensors, config = to_mlx(run_main, folder, tmp_path / "out")
    held, modules, _ = raw(folder)
    for name in modules:
        t, alpha, mu = raw_grid(folder, name)
        columns = t.shape[1]
        group = 64 if columns == 128 else 32  # rows of 160 are not whole groups of 64
        assert config["quantization"].get(name, config["quantization"])["group_size"] == group
        assert np.array_equal(words(tensors[f"{name}.weight"], 2), t.numpy() + 1)
        for part, expected in (("scales", alpha), ("biases", (mu - alpha).half().double())):
            assert torch.equal(tensors[f"{name}.{part}"].double().repeat_interleave(group, 1), expected)
    plain = {name for name in held if name.rpartition(".")[2] not in ("trits", "scale", "shift")}
    assert all(torch.equal(tensors[name], held[name]) for name in plain)
    assert tensors.keys() - plain == {
        f"{m}.{part}" for m in modules for part in ("weight", "scales", "biases")
    }
    assert config["rope_theta"] == ROPE["rope_theta"]
    assert config["rope_scaling"] is None


def test_a_block_of_several_groups_repeats_its_grid(run_main: Run, tmp_path: Path) -> None:
    """Blocks of 128 in rows of 576 columns go in as groups of 64, the last block being half a block."""
    sizes = {**SIZES, "hidden_size": 576, "intermediate_size": 256}
    config = transformers.LlamaConfig(**sizes, rope_parameters=ROPE, head_dim=32)
    folder = write(tmp_path / "checkpoint", config, block_size=128)
    tensors, written = to_mlx(run_main, folder, tmp_path / "out")
    assert written["quantization"]["group_size"] == 64
    assert written["quantization"]["model.layers.0.mlp.down_proj"]["group_size"] == 128
    scale = raw(folder)[0]["model.layers.0.mlp.up_proj.scale"]
    expected = scale.repeat_interleave(2, dim=1)[:, :9]
    assert torch.equal(tensors["model.layers.0.mlp.up_proj.scales"], expected)


def test_an_embedding_is_rounded_to_8_bits_in_groups(run_main: Run, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", config_of("untied"))
    tensors, config = to_mlx(run_main, folder, tmp_path / "out", "--embedding", "8bit")
    for name in ("model.embed_tokens", "lm_head"):
        assert config["quantization"][name] == {"group_size": 128, "bits": 8, "mode": "affine"}
        scales, biases = (tensors[f"{name}.{part}"].double().numpy() for part in ("scales", "biases"))
        got = words(tensors[f"{name}.weight"], 8) * scales + biases
        own = raw(folder)[0][f"{name}.weight"].double().numpy()
        assert np.abs(got - own).max() <= 0.5001 * scales.max()


def grouped(period: int) -> Any:
    kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(4)]
    return transformers.Gemma3TextConfig(
        **{**WIDE, "num_hidden_layers": 4, "rope_parameters": None},
        head_dim=64,
        sliding_window=8,
        layer_types=kinds,
        query_pre_attn_scalar=64,
    )


def test_windows_and_bases_have_the_names_that_mlx_lm_reads(run_main: Run, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", grouped(2))
    _, config = to_mlx(run_main, folder, tmp_path / "out")
    assert (config["sliding_window"], config["sliding_window_pattern"]) == (8, 2)
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            tiny.CONFIGS["opt"],
            {},
            "MLX export does not support opt models, only llama, mistral",
        ),
        (
            lambda: config_of("tied"),
            {"block_size": 48},
            "cannot hold model.layers.0.self_attn.q_proj, as it",
        ),
        (
            lambda: transformers.MistralConfig(**WIDE, sliding_window=8),
            {},
            "all of its layers have sliding",
        ),
        (
            lambda: transformers.Qwen2Config(
                **WIDE, use_sliding_window=True, sliding_window=8, max_window_layers=0
            ),
            {},
            "its attention in windows of 8 tokens would be lost",
        ),
        (lambda: transformers.Qwen2Config(**WIDE, head_dim=128), {}, "its heads are 128 wide"),
        (
            lambda: transformers.LlamaConfig(
                **{
                    **WIDE,
                    "rope_parameters": {
                        "rope_type": "yarn",
                        "rope_theta": 1e4,
                        "factor": 4.0,
                        "original_max_position_embeddings": 64,
                        "attention_factor": 1.3,
                    },
                }
            ),
            {},
            "the attention_factor of its yarn scaling would be lost",
        ),
    ],
)
def test_what_mlx_lm_would_compute_otherwise_is_refused(
    config: Callable[[], Any],
    options: dict[str, Any],
    message: str,
    run_main: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = write(tmp_path / "checkpoint", config(), **options), tmp_path / "out"
    assert run_main(export_main, folder, "--format", "mlx", "--out", out) == EXIT_USAGE
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_the_folder_of_a_model_is_not_written_over(
    plain: Path, run_main: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save(tiny.make_model("llama"), tmp_path / "original")
    arguments = (plain, "--format", "mlx", "--force", "--out")
    assert run_main(export_main, *arguments, tmp_path / "original") == EXIT_USAGE
    assert "contains another model's weights (model.safetensors)" in capsys.readouterr().err
    for _ in range(2):  # an export may be written over
        assert run_main(export_main, *arguments, tmp_path / "out") == 0
