"""Targets of experts, against loops over experts and tokens in float64 and transformers' own experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from harness.calibration.capture import capture_inputs
from harness.calibration.layerwise import fit_layers
from harness.calibration.stream import Writer, stream_writers
from harness.calibration.targets import Targets
from harness.models.decoder import find_decoder_layers
from harness.models.experts import up_name
from harness.models.linearize import linearize
from tests.harness import tiny

WIDTH, INNER, EXPERTS, TURNS = 32, 40, 4, 2
WINDOWS = torch.randint(3, tiny.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))

_SHAPE = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": INNER,
    "pad_token_id": 0,
}
_ROUTED = {"moe_intermediate_size": INNER, "num_experts_per_tok": 2}
CONFIGS: dict[str, Any] = {
    "mixtral": lambda: transformers.MixtralConfig(**_SHAPE, num_local_experts=EXPERTS),
    # All experts are chosen, by a router that is 0: all weights are 1/4.
    "all equal": lambda: transformers.MixtralConfig(
        **_SHAPE, num_local_experts=EXPERTS, num_experts_per_tok=EXPERTS
    ),
    # Expert 3 is never chosen.
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_SHAPE, head_dim=32, num_local_experts=EXPERTS, num_experts_per_tok=2
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_SHAPE, **_ROUTED, num_experts=EXPERTS, shared_expert_intermediate_size=INNER
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **_SHAPE,
        **_ROUTED,
        n_routed_experts=EXPERTS,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=0,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    # Scores multiply what an expert reads, not what it writes.
    "llama4": lambda: transformers.Llama4TextConfig(
        **_SHAPE,
        head_dim=16,
        intermediate_size_mlp=INNER,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
    ),
    # A factor stands between the mixture and the stream.
    "granitemoe": lambda: transformers.GraniteMoeConfig(
        **_SHAPE, num_local_experts=EXPERTS, num_experts_per_tok=2, residual_multiplier=0.5
    ),
}


def model_of(kind: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(3)
    # transformers' batched experts have no float64.
    model = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[kind](), dtype=torch.float32, experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.1)
            elif parameter.ndim == 3 or name.endswith("_proj.weight"):
                parameter *= 4  # so that layers change the stream
            if name.endswith("router.bias"):
                parameter[3] = -1e4
            if kind == "all equal" and name.endswith("gate.weight"):
                parameter.zero_()
    return model.to(dtype)


def layers_of(model: Any) -> Any:
    return model.model.layers


def experts_of(layer: Any) -> tuple[str, Any]:
    """The fused experts of a layer of transformers, and their name."""
    return next((name, module) for name, module in layer.named_modules() if name.endswith(".experts"))


@pytest.mark.parametrize(
    ("kind", "writers"),
    [
        ("mixtral", ["mlp.experts"]),
        ("gpt_oss", ["mlp.experts"]),
        # The shared expert's output has a factor.
        ("qwen2_moe", ["mlp.experts in mlp"]),
        ("deepseek_v3", ["mlp.experts in mlp", "mlp.shared_experts.down_proj in mlp"]),
        (
            "llama4",
            ["feed_forward.experts in feed_forward", "feed_forward.shared_expert.down_proj in feed_forward"],
        ),
        ("granitemoe", []),
    ],
)
def test_mixtures_that_add_to_the_stream_are_found(kind: str, writers: list[str]) -> None:
    model = model_of(kind, torch.float32)
    linearize(model)
    passage = capture_inputs(model, find_decoder_layers(model), WINDOWS)
    layer = passage.enter(0)

    def described(writer: Writer) -> str:
        return writer.name if writer.block == writer.name else f"{writer.name} in {writer.block}"

    found = stream_writers(passage, layer, passage.input_groups(layer))
    attention = [] if kind == "granitemoe" else ["self_attn.o_proj"]
    assert [described(writer) for writer in found] == attention + writers


def is_llama4(experts: Any) -> bool:
    return isinstance(experts, Llama4TextExperts)


def one_expert_a_token(slots: torch.Tensor) -> list[torch.Tensor]:
    """Inputs, expert and weight of each token, given a row for every expert and token."""
    by_expert = slots.view(EXPERTS, -1, WIDTH)
    chosen = (by_expert != 0).any(dim=2)
    assert (chosen.sum(dim=0) == 1).all()
    index = chosen.int().argmax(dim=0)
    return [by_expert.sum(dim=0), index[:, None], torch.ones_like(index[:, None]).double()]


@dataclass
class Pass:
    """What the fused experts of a layer read, in float64, and the output of the layer."""

    experts: Any
    x: np.ndarray
    index: np.ndarray
    w: np.ndarray
    output: np.ndarray

    @classmethod
    def of(cls, model: Any, layer: int) -> Pass:
        found: list[list[torch.Tensor]] = []
        outputs = []
        module = layers_of(model)[layer]
        experts = experts_of(module)[1]
        handles = [
            experts.register_forward_pre_hook(lambda _, args: found.append(list(args))),
            module.register_forward_hook(
                lambda _, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
            ),
        ]
        with torch.no_grad():
            for window in WINDOWS:
                model(window[None], use_cache=False)
        for handle in handles:
            handle.remove()
        if is_llama4(experts):
            found = [one_expert_a_token(slots) for (slots,) in found]
        x, index, w = (torch.cat(part).numpy() for part in zip(*found, strict=True))
        return cls(experts, x, index, w, torch.cat([o.flatten(0, -2) for o in outputs]).numpy())

    def matrix(self, part: str, expert: int) -> np.ndarray:
        weight = getattr(self.experts, part)[expert].detach().numpy()
        transposed = is_llama4(self.experts) or self.experts.is_transposed
        return weight.T if transposed else weight

    def inner(self, x: np.ndarray, expert: int) -> np.ndarray:
        """What an expert passes to its down_proj for one token."""
        read = torch.from_numpy(self.matrix(up_name(self.experts), expert) @ x)[None]
        if is_llama4(self.experts):
            gate, up = (half[0].numpy() for half in read.chunk(2, dim=1))
            return gate / (1 + np.exp(-gate)) * up
        if self.experts.has_bias:
            read = read + self.experts.gate_up_proj_bias[expert]
        with torch.no_grad():
            return self.experts._apply_gate(read)[0].numpy()


def statistics(
    ours: Pass, theirs: Pass, part: str, turn: list[int], stream: bool, token_weights: bool
) -> dict[int, tuple[np.ndarray, np.ndarray, int]]:
    """Gram matrix, lost products and tokens of each expert, token by token."""
    found = {}
    for expert in range(EXPERTS):
        W = theirs.matrix(part, expert)
        C, D, n = np.zeros((W.shape[1], W.shape[1])), np.zeros(W.shape), 0
        for t, chosen in enumerate(ours.index):
            for j in np.flatnonzero(chosen == expert):
                n += 1
                if part != "down_proj":
                    C += np.outer(ours.x[t], ours.x[t])
                    D += np.outer(W @ (theirs.x[t] - ours.x[t]), ours.x[t])
                    continue
                h, w = ours.inner(ours.x[t], expert), ours.w[t, j]
                omega = 1 / np.square(theirs.output[t]).mean() if stream and token_weights else 1.0
                C += omega * w**2 * np.outer(h, h)
                if expert not in turn:
                    continue
                if stream:
                    missing = theirs.output[t] - ours.output[t]
                    wanted = w * missing / sum(ours.w[t, i] ** 2 for i, f in enumerate(chosen) if f in turn)
                    wanted += (ours.matrix(part, expert) - W) @ h  # of an expert that is fitted again
                else:
                    wanted = W @ (theirs.inner(theirs.x[t], expert) - h)
                D += omega * w**2 * np.outer(wanted, h)
        found[expert] = C, D, n
    average = sum(C for C, _, _ in found.values()) / sum(n for _, _, n in found.values())
    return {
        expert: (C + max(len(C) - n, 0) * average, D, n)
        for expert, (C, D, n) in found.items()
        if expert in turn
    }


def halve(model: Any, layer: int, part: str, experts: list[int]) -> None:
    fused = experts_of(layers_of(model)[layer])[1]
    with torch.no_grad():
        getattr(fused, part)[experts] /= 2


@pytest.mark.parametrize(
    ("kind", "stream", "token_weights", "kept"),
    [
        ("mixtral", True, True, True),
        ("mixtral", True, False, False),
        ("mixtral", False, False, True),
        ("all equal", True, True, True),
        ("gpt_oss", True, True, False),
        ("qwen2_moe", True, True, True),
        ("deepseek_v3", True, True, True),
        ("llama4", True, True, True),
        ("llama4", False, False, False),
        ("granitemoe", True, True, False),
    ],
)
def test_statistics_of_experts_are_those_of_a_loop_over_tokens(
    kind: str, stream: bool, token_weights: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.calibration.targets.KEPT_BYTES", 1e9 * kept)
    monkeypatch.setattr("harness.calibration.targets.TURNS", TURNS)
    model = model_of(kind, torch.float32)
    linearize(model)
    passage = capture_inputs(model, find_decoder_layers(model), WINDOWS)
    passage.keep_original()
    seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def shift(W: torch.Tensor, C: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
        seen.append((W.double().numpy().copy(), C.numpy(), D.numpy()))
        return W

    targets = Targets(shift, stream, token_weights)
    fitted = {
        matrix.name: matrix
        for layer in fit_layers(passage, lambda W, C: W.numpy() / 2, true_sequential=True, targets=targets)
        for matrix in layer.matrices
    }
    names = list(fitted)
    original, ours = model_of(kind, torch.float64), model_of(kind, torch.float64)
    streams = stream and kind != "granitemoe"
    for layer in range(2):
        name, fused = experts_of(layers_of(ours)[layer])
        full = f"model.layers.{layer}.{name}"
        parts = [up_name(fused), "down_proj"]
        turns = [[0, 2], [1, 3]] if streams else [[0, 1, 2, 3]]
        sweeps = [0, 1] if streams else [0]
        stages = [(parts[0], [0, 1, 2, 3], 0)]
        stages += [("down_proj", turn, sweep) for sweep in sweeps for turn in turns]
        # What is fitted before the experts of this layer.
        begun = names.index(f"{full}.0.{parts[0]}")
        with torch.no_grad():
            for other in names[:begun]:
                module = dict(ours.named_modules()).get(other)
                if module is not None:
                    module.weight.copy_(dict(original.named_modules())[other].weight / 2)
        for part, turn, sweep in stages:
            expected = statistics(
                Pass.of(ours, layer), Pass.of(original, layer), part, turn, streams, token_weights
            )
            for expert, (C, D, n) in expected.items():
                matrix = fitted[f"{full}.{expert}.{part}"]
                W = Pass.matrix(Pass(experts_of(layers_of(original)[layer])[1], *[None] * 4), part, expert)
                _, found_C, found_D = [found for found in seen if np.array_equal(found[0], W)][sweep]
                assert matrix.tokens == n
                # float32 activations, and float32 products of a few dozen rows.
                np.testing.assert_allclose(found_C, C, rtol=1e-4, atol=1e-5 * np.abs(C).max())
                np.testing.assert_allclose(found_D, D, rtol=1e-3, atol=3e-5 * np.abs(D).max() + 1e-6)
                if n == 0:
                    assert not found_D.any()
            if sweep == 0:
                halve(ours, layer, part, turn)
    tokens = [matrix.tokens for name, matrix in fitted.items() if ".down_proj" in name and "experts." in name]
    assert kind != "gpt_oss" or 0 in tokens
    assert kind != "all equal" or set(tokens) == {WINDOWS.numel()}
