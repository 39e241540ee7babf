"""Targets from the original model, against passes through both whole models with plain hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from harness.calibration.capture import capture_inputs
from harness.calibration.layerwise import fit_layers
from harness.calibration.stream import stream_writers
from harness.calibration.targets import Targets
from harness.compute import Compute
from harness.models.decoder import find_decoder_layers
from reference import targets as equations
from tests.harness import tiny


def windows(count: int = 3, seqlen: int = 24) -> torch.Tensor:
    return torch.randint(3, tiny.VOCABULARY, (count, seqlen), generator=torch.Generator().manual_seed(1))


def random_model(kind: str) -> Any:
    shape = {
        "vocab_size": tiny.VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    configs = {
        "phi3": lambda: transformers.Phi3Config(**shape, intermediate_size=96, pad_token_id=0),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**shape, intermediate_size=96),
        "granite": lambda: transformers.GraniteConfig(
            **shape, intermediate_size=96, num_key_value_heads=2, residual_multiplier=0.5
        ),
    }
    if kind in tiny.CONFIGS:
        return tiny.make_model(kind, torch.float32, ternary=False)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(configs[kind]()).eval()


@pytest.mark.parametrize(
    ("kind", "writers"),
    [
        ("llama", ["self_attn.o_proj", "mlp.down_proj"]),
        ("qwen3", ["self_attn.o_proj", "mlp.down_proj"]),
        ("phi3", ["self_attn.o_proj", "mlp.down_proj"]),
        ("opt", ["self_attn.out_proj", "fc2"]),
        # A norm, or a factor, comes between the matrix and the stream.
        ("gemma3", []),
        ("granite", []),
        # Attention and MLP run side by side, and the stream between them is no module's input.
        ("gpt_neox", []),
    ],
)
def test_matrices_that_add_to_the_stream_are_found(kind: str, writers: list[str]) -> None:
    model = random_model(kind)
    decoder = find_decoder_layers(model)
    passage = capture_inputs(model, decoder, windows())
    layer = passage.enter(0)
    found = stream_writers(passage, layer, passage.input_groups(layer))
    assert [writer.name for writer in found] == writers


@pytest.mark.parametrize("kind", ["gemma3", "granite", "llama"])
def test_a_large_channel_hides_no_norm_nor_factor_in_16_bits(kind: str) -> None:
    model = random_model(kind).to(torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] *= 1000
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight *= 0.1
    decoder = find_decoder_layers(model)
    compute = Compute(dtype=None)  # layers in the dtype of the model, as on a GPU
    passage = capture_inputs(model, decoder, windows(), compute)
    layer = passage.enter(0)
    found = stream_writers(passage, layer, passage.input_groups(layer))
    assert bool(found) == (kind == "llama")


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("token_weights", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_lost_products_are_those_of_both_whole_models(
    stream: bool, token_weights: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.calibration.targets.KEPT_BYTES", 1e9 * kept)
    model = tiny.make_model("llama", torch.float32, ternary=False)
    original = tiny.make_model("llama", torch.float32, ternary=False)
    decoder, names = find_decoder_layers(model), [*find_decoder_layers(original).named_linears()]
    weights = {name: linear.weight.detach().clone() for name, linear in decoder.named_linears().items()}
    seen: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def shift(W: torch.Tensor, C: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
        seen[W.data_ptr()] = (W.double().numpy(), C.numpy(), D.numpy())
        return W

    passage = capture_inputs(model, decoder, windows())
    passage.keep_original()
    targets = Targets(shift, stream, token_weights)
    fitted = [
        matrix
        for layer in fit_layers(passage, lambda W, C: W.numpy() / 2, true_sequential=True, targets=targets)
        for matrix in layer.matrices
    ]
    assert [matrix.name for matrix in fitted] == sorted(names, key=stage)

    for matrix in fitted:
        with torch.no_grad():
            for name, linear in decoder.named_linears().items():
                halved = stage(name) < stage(matrix.name)
                linear.weight.copy_(weights[name] / 2 if halved else weights[name])
        X_hat, before_hat = inputs_and_stream(model, matrix.name)
        X, before = inputs_and_stream(original, matrix.name)
        W = weights[matrix.name].double().numpy()
        wanted, omega = X @ W.T, None
        if stream and matrix.name.endswith(("o_proj", "down_proj")):
            wanted = before + wanted - before_hat
            if token_weights:
                omega = equations.token_weights(before + X @ W.T)
        expected = equations.lost_products(wanted, W, X_hat, omega)
        weighted = X_hat if omega is None else np.sqrt(omega) * X_hat
        _, C, D = next(found for found in seen.values() if np.array_equal(found[0], W))
        # float32 activations, and float32 products of a few dozen rows.
        np.testing.assert_allclose(C, weighted.T @ weighted, rtol=1e-4, atol=1e-5 * np.abs(C).max())
        np.testing.assert_allclose(D, expected, rtol=1e-3, atol=2e-5 * np.abs(expected).max() + 1e-5)


def stage(name: str) -> tuple[int, int]:
    """Where a matrix stands in the order of the fits."""
    groups = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    layer, leaf = int(name.split(".")[2]), name.rpartition(".")[2]
    return layer, next(i for i, group in enumerate(groups) if leaf in group)


def inputs_and_stream(model: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of a matrix, and the residual stream before its sub-layer, over all windows."""
    modules = dict(model.named_modules())
    layer = modules[name.rpartition("layers.")[0] + "layers." + name.split(".")[2]]
    norm = layer.input_layernorm if "self_attn" in name else layer.post_attention_layernorm
    found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    handles = [
        module.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].flatten(0, 1)))
        for module, kept in zip((modules[name], norm), found, strict=True)
        if isinstance(module, nn.Module)
    ]
    with torch.no_grad():
        for window in windows():
            model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    inputs, streams = (torch.cat(part).double().numpy() for part in found)
    return inputs, streams


def test_an_unquantized_layer_loses_nothing() -> None:
    model = tiny.make_model("llama", torch.float32, ternary=False)
    decoder = find_decoder_layers(model)
    passage = capture_inputs(model, decoder, windows())
    passage.keep_original()
    lost: list[float] = []

    def shift(W: torch.Tensor, C: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
        lost.append(float(D.abs().max()))
        return W

    for _ in fit_layers(passage, lambda W, C: W.numpy(), targets=Targets(shift)):
        pass
    assert len(lost) == 21
    assert max(lost) == 0
