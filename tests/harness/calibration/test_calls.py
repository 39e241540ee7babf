"""Layers that take more than hidden states, or several vectors a token, run one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from harness.architectures.configs import small_config
from harness.calibration.calls import LayerCall, Varying, merged
from harness.calibration.capture import capture_inputs, logits_after
from harness.calibration.layerwise import fit_layers
from harness.calibration.passage import Passage
from harness.calibration.targets import Targets
from harness.errors import UserError
from harness.models.decoder import DecoderLayers, find_decoder_layers
from harness.models.linearize import linearize
from harness.quantize.states import KeptStates
from tests.harness import tiny

WINDOWS = torch.randint(3, tiny.VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))

# The first two pass parts of the embeddings to every layer, and the last two layers of each read the keys and
# values that earlier layers left. Zamba2 passes the embeddings, HY-V4 has several vectors a token. Layers of
# GLM-5 attend to the tokens that the one before chose; those of Zaya read what its router computed, and use a
# matrix once more on zeros.
KINDS = ("gemma4_text", "gemma3n_text", "zamba2", "hy_v4", "glm_moe_dsa", "zaya")


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    config = small_config(kind)
    if kind == "glm_moe_dsa":
        config.num_hidden_layers, config.index_topk = 3, 4
        config.indexer_types, config.mlp_layer_types = ["full", "shared", "shared"], ["dense"] * 3
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def outputs_of(model: Any) -> list[torch.Tensor]:
    """Output of the last layer for every window, from passes through the whole model."""
    found = []
    layers = find_decoder_layers(model).layers
    handle = layers[-1].register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        for window in WINDOWS:
            model(window[None], use_cache=False)
    handle.remove()
    return [output[0] if isinstance(output, tuple) else output for output in found]


def passage_of(model: Any) -> Passage:
    linearize(model)
    passage = capture_inputs(model, find_decoder_layers(model), WINDOWS)
    passage.keep_original()
    return passage


@pytest.mark.parametrize("kind", KINDS)
def test_both_models_give_what_they_give_as_a_whole_and_a_resumed_run_the_same(kind: str) -> None:
    model = model_of(kind)
    passage = passage_of(model)
    expected = outputs_of(model)
    targets = Targets(lambda W, C, D: W)
    for _ in fit_layers(passage, lambda W, C: W.numpy() / 2, true_sequential=True, targets=targets):
        pass
    for original, states, theirs, ours in zip(
        passage.originals, passage.hidden, expected, outputs_of(model), strict=True
    ):
        torch.testing.assert_close(original, theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states, ours, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(states, original, rtol=0.1, atol=1e-4)

    stored = [{name: linear.weight for name, linear in own.items()} for own in passage.decoder.linears]
    again = passage_of(model_of(kind))
    for _ in again.again(stored):
        pass
    assert all(map(torch.equal, again.hidden, passage.hidden))
    assert all(map(torch.equal, again.originals, passage.originals))


class Layer(nn.Module):
    """Returns its input beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, states: torch.Tensor, other: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        return self.linear(states), states


class FromTheFirst(nn.Module):
    """Hands what the first layer returned to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tiny.VOCABULARY, 4)
        self.layers = nn.ModuleList([Layer(), Layer(), Layer()])

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> None:
        states, other = self.layers[0](self.embedding(input_ids))
        states, _ = self.layers[1](states)
        self.layers[2](states, other)


@pytest.mark.parametrize("kind", ["gemma3n_text", "glm_moe_dsa", "zaya"])
def test_states_of_layers_that_hand_more_on_are_not_kept(kind: str, tmp_path: Path) -> None:
    """A resumed run would lack it."""
    with pytest.raises(UserError, match="--keep-states keeps hidden states alone"):
        KeptStates(tmp_path, tmp_path / "out", passage_of(model_of(kind)), *WINDOWS.shape)


def test_what_an_earlier_layer_than_the_one_before_returned_is_refused() -> None:
    model = FromTheFirst()
    with pytest.raises(UserError, match="FromTheFirst does more between its decoder layers than pass on"):
        capture_inputs(model, DecoderLayers("layers", model.layers, [{}, {}, {}]), WINDOWS)


def test_a_matrix_that_is_used_again_on_anything_else_is_refused() -> None:
    model = tiny.make_model("llama")
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(
            lambda mlp, args, output: output + mlp.down_proj(mlp.gate_proj(args[0]))
        )
    passage = passage_of(model)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.\w+_proj is used more than once"):
        passage.input_groups(passage.enter(1))


def test_a_matrix_that_is_used_again_on_zeros_counts_every_token_once() -> None:
    model = model_of("zaya")
    passage = passage_of(model)
    layer = passage.enter(0)
    groups = passage.input_groups(layer)
    name = "self_attn.qkv_proj.v_proj_delayed"
    assert [group for group in groups if name in group] == [
        [f"self_attn.qkv_proj.{part}" for part in ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed")]
    ]
    (total,) = passage.collect(layer, [[name]])
    assert total.gram.rows == WINDOWS.numel()
    with torch.no_grad():
        x = torch.cat([layer.module.input_layernorm(states)[0] for states in passage.hidden]).double()
    torch.testing.assert_close(total.gram.finish(), x.T @ x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cross", [[1], [1, 2]], ids=["between", "last"])
@pytest.mark.parametrize("true_sequential", [True, False])
def test_layers_that_text_skips_stay_as_they_are(cross: list[int], true_sequential: bool) -> None:
    """Those of Mllama that attend to images; with the others fitted, logits are those of the whole model."""
    config = small_config("mllama")
    config.text_config.num_hidden_layers = 4 if cross == [1] else 3
    config.text_config.cross_attention_layers = cross
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    layers = model.model.language_model.layers
    before = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    passage = passage_of(model)
    assert passage.decoder.skipped == tuple(cross)
    targets = Targets(lambda W, C, D: W)
    fits = fit_layers(passage, lambda W, C: W.numpy() / 2, true_sequential=true_sequential, targets=targets)
    assert [len(layer.matrices) for layer in fits] == [0 if i in cross else 7 for i in range(len(layers))]
    for name, tensor in layers.state_dict().items():
        factor = 2 if name.endswith("_proj.weight") and int(name.split(".")[0]) not in cross else 1
        assert torch.equal(factor * tensor, before[name]), name
    for window, states in zip(WINDOWS, passage.hidden, strict=True):
        with torch.no_grad():
            expected = model(window[None]).logits
        torch.testing.assert_close(
            logits_after(model, passage, window, states), expected, rtol=1e-4, atol=1e-5
        )


def test_arguments_that_differ_are_kept_for_every_window() -> None:
    mask = torch.ones(2, 2)
    calls = [LayerCall((mask.clone(),), {"parts": [torch.tensor([i // 2]), i]}) for i in range(4)]
    found = merged(iter(calls))
    assert torch.equal(found.args[0], mask)
    parts = found.kwargs["parts"][0]
    assert isinstance(parts, Varying)
    assert [int(value) for value in parts.values] == [0, 0, 1, 1]
    assert found.bytes_of_windows() == 8
    seen = []
    layer = torch.nn.Identity()
    layer.forward = lambda hidden, mask, parts: seen.append(int(parts[0])) or hidden
    for window in (3, 1):
        found(layer, torch.zeros(1), window, {})
    assert seen == [1, 0]


def test_arguments_that_depend_on_earlier_layers_are_refused() -> None:
    model = tiny.make_model("llama", torch.float32)
    decoder = find_decoder_layers(model)
    decoder.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "size": args[0].sum()}), with_kwargs=True
    )
    with pytest.raises(
        UserError, match="decoder layer 1 of LlamaForCausalLM takes arguments that depend on what earlier"
    ):
        capture_inputs(model, decoder, WINDOWS)


def test_hidden_states_of_no_token_are_refused() -> None:
    model = model_of("hy_v4")
    decoder = find_decoder_layers(model)
    decoder.layers[0].register_forward_pre_hook(
        lambda module, args: (args[0].repeat(1, 2, 1, 1), *args[1:]), prepend=True
    )
    with pytest.raises(UserError, match="for 24 tokens, not one or several vectors a token"):
        capture_inputs(model, decoder, WINDOWS)
