"""Experts of mixtures in GGUF and MLX, against the checkpoint's bytes; tests/runtimes runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import harness
from harness.cli import EXIT_USAGE
from harness.export.__main__ import main as export_main
from tests.harness.export.checkpoints import ROPE, SIZES, Run, raw, raw_grid, to_gguf, write

EXPERTS = 4
GATE, UP = slice(160), slice(160, 320)
SHARED = {**SIZES, "rope_parameters": ROPE, "num_experts": EXPERTS, "num_experts_per_tok": 2}


def mixtral(**own: Any) -> Any:
    return transformers.MixtralConfig(**SHARED, **own)


def qwen3(**own: Any) -> Any:
    settings = {"moe_intermediate_size": 160, "norm_topk_prob": True, **own}
    return transformers.Qwen3MoeConfig(**SHARED, **settings)


def qwen2(**own: Any) -> Any:
    settings = {"moe_intermediate_size": 160, "shared_expert_intermediate_size": 64, **own}
    return transformers.Qwen2MoeConfig(**SHARED, **settings)


def olmoe(**own: Any) -> Any:
    return transformers.OlmoeConfig(**{**SHARED, "num_key_value_heads": 4}, **own)


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(file).tensors
    }


def stored_parts(folder: Path, own: str) -> list[tuple[Any, Any, Any]]:
    """t, alpha, mu of one matrix of every expert of the second layer."""
    return [raw_grid(folder, f"model.layers.1.mlp.experts.{expert}.{own}") for expert in range(EXPERTS)]


def test_experts_of_a_layer_are_three_tensors_of_gguf(run_main: Run, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", mixtral(), dtype=torch.bfloat16)
    file = to_gguf(run_main, folder, tmp_path / "a.gguf")
    held = tensors_of(file)
    for name, own, rows in (
        ("gate", "gate_up_proj", GATE),
        ("up", "gate_up_proj", UP),
        ("down", "down_proj", slice(None)),
    ):
        expected = torch.stack(
            [
                (alpha.float() * (t + 1) + (mu - alpha).half().float())[rows]
                for t, alpha, mu in stored_parts(folder, own)
            ]
        )
        assert np.array_equal(held[f"blk.1.ffn_{name}_exps.weight"], expected.numpy())
    reader = gguf.GGUFReader(file)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.1.ffn_down_exps.weight"] == kinds["blk.1.attn_q.weight"] == "Q4_1"
    # llama.cpp would round a router's inputs to the router's type.
    assert kinds["blk.1.ffn_gate_inp.weight"] == "F32"
    router = raw(folder)[0]["model.layers.1.mlp.gate.weight"]
    assert np.array_equal(held["blk.1.ffn_gate_inp.weight"], router.float().numpy())
    assert reader.fields["llama.expert_count"].contents() == EXPERTS
    assert reader.fields["llama.expert_used_count"].contents() == 2


def test_sizes_of_experts_are_stated(run_main: Run, tmp_path: Path) -> None:
    for kind, config in (("qwen3moe", qwen3()), ("qwen2moe", qwen2())):
        folder = write(tmp_path / kind, config)
        fields = gguf.GGUFReader(to_gguf(run_main, folder, tmp_path / f"{kind}.gguf")).fields
        assert fields[f"{kind}.expert_feed_forward_length"].contents() == 160
    assert fields["qwen2moe.expert_shared_feed_forward_length"].contents() == 64


def test_experts_of_a_layer_are_three_modules_of_mlx(run_main: Run, tmp_path: Path) -> None:
    folder, out = write(tmp_path / "checkpoint", qwen3()), tmp_path / "mlx"
    assert run_main(export_main, folder, "--format", "mlx", "--out", out) == 0
    tensors, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    for name, own, rows in (
        ("gate_proj", "gate_up_proj", GATE),
        ("up_proj", "gate_up_proj", UP),
        ("down_proj", "down_proj", slice(None)),
    ):
        module = f"model.layers.1.mlp.switch_mlp.{name}"
        group = config["quantization"].get(module, config["quantization"])["group_size"]
        assert group == (32 if name == "down_proj" else 64)
        words = tensors[f"{module}.weight"].numpy().view(np.uint32)[..., None]
        digits = (words >> np.arange(0, 32, 2, dtype=np.uint32) & 3).reshape(EXPERTS, len(words[0]), -1)
        for expert, (t, alpha, mu) in enumerate(stored_parts(folder, own)):
            assert np.array_equal(digits[expert], t[rows].numpy() + 1)
            for part, expected in (("scales", alpha), ("biases", (mu - alpha).half().double())):
                got = tensors[f"{module}.{part}"][expert].double().repeat_interleave(group, dim=1)
                assert torch.equal(got, expected[rows])
    assert not any(".experts." in name for name in tensors)
    assert config["num_experts"] == EXPERTS


def test_every_expert_has_an_order_of_its_own(run_main: Run, tmp_path: Path) -> None:
    """Each down_proj's order of columns goes into the rows of its own gate and up."""

    def order(name: str, columns: int) -> np.ndarray:
        if not name.endswith("down_proj"):
            return np.arange(columns)
        return np.random.default_rng(list(name.encode())).permutation(columns)

    folder = write(tmp_path / "checkpoint", mixtral(), order=order)
    held = tensors_of(to_gguf(run_main, folder, tmp_path / "a.gguf", "--type", "F32"))
    gate, up, down = (
        torch.from_numpy(held[f"blk.0.ffn_{name}_exps.weight"]) for name in ("gate", "up", "down")
    )
    experts = harness.load(folder, dense=True).model.layers[0].mlp.experts
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    for number in range(EXPERTS):
        expert = experts.get_submodule(str(number))
        halves = expert.gate_up_proj(x).chunk(2, dim=-1)
        expected = expert.down_proj(torch.nn.functional.silu(halves[0]) * halves[1])
        inner = torch.nn.functional.silu(x @ gate[number].T) * (x @ up[number].T)
        torch.testing.assert_close(inner @ down[number].T, expected)


@pytest.mark.parametrize(
    ("format_", "config", "message"),
    [
        (
            "gguf",
            lambda: qwen3(norm_topk_prob=False),
            "its norm_topk_prob is False; llama.cpp computes with True",
        ),
        (
            "gguf",
            lambda: qwen2(norm_topk_prob=True),
            "its norm_topk_prob is True; llama.cpp computes with False",
        ),
        ("gguf", lambda: qwen3(mlp_only_layers=[1]), "some of its layers have no experts"),
        ("gguf", lambda: qwen3(decoder_sparse_step=2), "some of its layers have no experts"),
        ("gguf", lambda: qwen3(moe_intermediate_size=16), "its experts were not ternarized"),
        ("gguf", lambda: qwen2(tie_word_embeddings=True), "llama.cpp expects a head of its own"),
        ("gguf", lambda: olmoe(clip_qkv=8.0), "its clip_qkv would be lost"),
        (
            "gguf",
            lambda: transformers.OlmoeConfig(**SHARED),
            "it has 2 heads of keys, and llama.cpp expects 4",
        ),
        ("mlx", lambda: qwen2(norm_topk_prob=True), "its norm_topk_prob would be lost"),
        ("mlx", lambda: qwen2(mlp_only_layers=[1]), "some of its layers have no experts"),
        ("mlx", lambda: qwen3(moe_intermediate_size=16), "its experts were not ternarized"),
        ("mlx", lambda: mixtral(head_dim=64), "its heads are 64 wide"),
        ("mlx", lambda: mixtral(sliding_window=8), "its attention in windows of 8 tokens would be lost"),
        ("mlx", lambda: olmoe(clip_qkv=8.0), "its clip_qkv would be lost"),
        (
            "mlx",
            lambda: transformers.Qwen3MoeConfig(
                **{**SHARED, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
            ),
            "its rope scaling (linear) would be lost",
        ),
    ],
)
def test_what_a_runtime_would_compute_otherwise_is_refused(
    format_: str,
    config: Callable[[], Any],
    message: str,
    run_main: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = write(tmp_path / "checkpoint", config()), tmp_path / "out"
    assert run_main(export_main, folder, "--format", format_, "--out", out) == EXIT_USAGE
    assert message in capsys.readouterr().err
    assert not out.exists()
