"""Conv1D and fused experts become linear layers that compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from harness.architectures.configs import WIDTH, small_config
from harness.compute import Compute
from harness.errors import UserError
from harness.models.decoder import find_decoder_layers
from harness.models.experts import Experts, family, separated
from harness.models.folder import SINGLE, files_of_tensors
from harness.models.linearize import linearize, put
from harness.models.loading import load_original
from tests.harness import tiny

TOKENS = torch.randint(3, tiny.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=64, n_layer=2, n_head=2, n_inner=160)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def experts_of(model: nn.Module) -> list[tuple[str, Experts]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Experts)]


@pytest.mark.parametrize("kind", tiny.MIXTURES)
@pytest.mark.parametrize("every", [False, True])
@torch.no_grad()
def test_separate_experts_compute_what_fused_ones_do(kind: str, every: bool) -> None:
    model = tiny.make_mixture(kind, torch.float32, ternary=False)
    expected = model(TOKENS).logits
    linearize(model)
    assert experts_of(model)
    for _, experts in experts_of(model):
        experts.every = every
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-6)  # biases round once more


@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_experts_that_are_fused_again_are_as_they_were(kind: str) -> None:
    model = tiny.make_mixture(kind, ternary=False)
    kinds = {name: type(module) for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(TOKENS).logits
    linearize(model)
    for name, experts in experts_of(model):
        put(model, name, experts.fuse())
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected)


@torch.no_grad()
def test_experts_without_the_decorator_of_transformers_are_separated_too() -> None:
    """Those of Step 3.7, whose gates have a limit."""
    config = small_config("step3p7").text_config
    fused = Step3p7Experts(config, swiglu_limit=0.05)
    for parameter in fused.parameters():
        nn.init.normal_(parameter, std=0.1)
    states, index, weights = torch.randn(6, WIDTH), torch.randint(0, 5, (6, 2)), torch.rand(6, 2)
    kind = separated(fused)
    assert kind is not None
    expected = fused(states, index, weights)
    torch.testing.assert_close(kind(fused)(states, index, weights), expected, rtol=1e-5, atol=1e-6)
    fused.limit = float("inf")
    assert not torch.allclose(fused(states, index, weights), expected)


@torch.no_grad()
def test_an_index_beyond_the_experts_is_no_expert() -> None:
    """Models that share out experts mark so what is computed elsewhere."""
    model = tiny.make_mixture("mixtral", torch.float32, ternary=False)
    linearize(model)
    experts = experts_of(model)[0][1]
    states = torch.randn(3, tiny.WIDTH)
    index, weights = torch.tensor([[0, 1], [4, 1], [4, 4]]), torch.rand(3, 2)
    alone = experts(states, index[:, 1:].clamp(max=3), weights[:, 1:])
    found = experts(states, index, weights)
    torch.testing.assert_close(found[1], alone[1])
    assert not found[2].any()


@torch.no_grad()
def test_rows_of_zeros_reach_no_expert_and_others_give_what_fused_experts_do() -> None:
    """Of Llama 4: tokens with one expert, with all of them, and with none."""
    model = tiny.make_mixture("llama4", torch.float32, ternary=False)
    fused = model.model.layers[0].feed_forward.experts
    slots = torch.randn(4, 5, tiny.WIDTH)
    routed = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 1, 0, 1], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0]])
    slots *= routed[..., None]
    expected = fused(slots.flatten(0, 1))
    linearize(model)
    experts = experts_of(model)[0][1]
    read: dict[int, torch.Tensor] = {}
    for number in range(4):
        matrix = experts.matrix(number, "gate_up_proj")
        matrix.register_forward_pre_hook(lambda _, args, number=number: read.update({number: args[0]}))
    torch.testing.assert_close(experts(slots.flatten(0, 1)), expected, rtol=1e-5, atol=1e-6)
    for number, rows in read.items():
        assert torch.equal(rows, slots[number, routed[number] == 1])
    none = torch.zeros(4 * 5, tiny.WIDTH)
    assert torch.equal(experts(none), none)


def test_an_expert_has_its_number_and_the_name_of_its_matrix() -> None:
    model = tiny.make_mixture("mixtral", ternary=False)
    linearize(model)
    decoder = find_decoder_layers(model, strict=True)
    names = {name for name in decoder.linears[0] if "experts" in name}
    parts = ("gate_up_proj", "down_proj")
    assert names == {f"mlp.experts.{number}.{part}" for number in range(4) for part in parts}
    assert family(decoder.layers[0], "mlp.experts.3.down_proj") == "mlp.experts.*.down_proj"
    assert family(decoder.layers[0], "self_attn.q_proj") is None
    assert not any("gate." in name for name in decoder.named_linears())


@torch.no_grad()
def test_a_conv1d_becomes_a_linear_layer_and_small_ones_stay() -> None:
    model = gpt2()
    small = model.transformer.h[1].attn.c_attn = transformers.pytorch_utils.Conv1D(192, 64)
    model.transformer.h[1].attn.router = transformers.pytorch_utils.Conv1D(64, 64)
    expected = model(TOKENS).logits
    linearize(model)
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-6)
    decoder = find_decoder_layers(model)
    assert len(decoder.named_linears()) == 2 * 4
    assert torch.equal(decoder.linears[1]["attn.c_attn"].weight, small.weight.T)
    assert type(model.transformer.h[1].attn.router) is transformers.pytorch_utils.Conv1D


def mixture(kind: str) -> Any:
    torch.manual_seed(0)
    config = small_config(kind)
    if kind == "qwen3_moe":
        config.num_experts = 12  # of which 10 comes before 2 in the order of letters
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn.weight"),
        ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w1.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.3.gate_proj.weight"),
        ("deepseek_v3", "model.layers.1.mlp.experts.3.gate_proj.weight"),
        ("llama4_text", "model.layers.1.feed_forward.experts.gate_up_proj"),
    ],
)
def test_rewritten_layers_are_read_from_the_files(
    kind: str, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save(gpt2() if kind == "gpt2" else mixture(kind), tmp_path)
    assert stored in files_of_tensors(tmp_path)
    model = load_original(str(tmp_path)).model
    monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    original = load_original(str(tmp_path))
    decoder = find_decoder_layers(original.model, linearize(original.model, original.read))
    linearize(model)
    for index, layer in enumerate(find_decoder_layers(model).layers):
        copy = decoder.working_copy(index, Compute(dtype=None)).state_dict()
        assert copy.keys() == layer.state_dict().keys()
        for name, tensor in layer.state_dict().items():
            assert torch.equal(copy[name], tensor), name


def test_a_folder_that_lacks_a_tensor_of_one_expert_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny.save(mixture("qwen3_moe"), tmp_path) / SINGLE
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    with pytest.raises(UserError, match=r"layers.1.mlp.experts.gate_up_proj is merged from 12 .*have 11 of"):
        load_original(str(tmp_path))
