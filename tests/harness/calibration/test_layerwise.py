"""Calibration layer by layer against passes through the whole model with plain hooks."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from harness.calibration.capture import capture_inputs, logits_after
from harness.calibration.gram import CHUNK_TOKENS, GramSum
from harness.calibration.layerwise import fit_layers
from harness.calibration.passage import Passage
from harness.compute import Compute
from harness.errors import UserError
from harness.models.decoder import find_decoder_layers
from tests.harness import tiny

ARCHITECTURES = sorted(tiny.CONFIGS)
RETURN_TUPLES = {"bloom", "codegen", "gpt_neo", "gptj"}


def windows(count: int = 3, seqlen: int = 24) -> torch.Tensor:
    return torch.randint(3, tiny.VOCABULARY, (count, seqlen), generator=torch.Generator().manual_seed(1))


def keep(W: np.ndarray, C: np.ndarray) -> np.ndarray:
    return W


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "bloom"])
def test_layers_run_one_by_one_give_what_the_whole_model_gives(kind: str) -> None:
    if kind == "bloom":  # whose layers take a mask by position
        config = transformers.BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=64, n_layer=3, n_head=4)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    else:
        model = tiny.make_model(kind, torch.float32, ternary=False)
    decoder = find_decoder_layers(model)
    expected = []
    handle = decoder.layers[-1].register_forward_hook(
        lambda module, args, output: expected.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        for window in windows():
            model(window[None], use_cache=False)
    handle.remove()
    passage = capture_inputs(model, decoder, windows())
    for _ in fit_layers(passage, keep):
        pass
    assert (passage.calls[0].extra is not None) == (kind in RETURN_TUPLES)
    for states, wanted, window in zip(passage.hidden, expected, windows(), strict=True):
        with torch.no_grad():
            logits = model(window[None], use_cache=False).logits
        torch.testing.assert_close(logits_after(model, passage, window, states), logits)
        # The same float32 operations in the same order; only a thread pool could split them differently.
        torch.testing.assert_close(states, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma3", "mistral"])
def test_a_window_of_attention_shorter_than_the_sequence_matters(kind: str) -> None:
    """Guards the test above: without the window it would pass for a pipeline that drops the masks."""
    model = tiny.make_model(kind, torch.float32, ternary=False)
    short = model(windows(), use_cache=False).logits
    model.config.sliding_window = 24
    for layer in find_decoder_layers(model).layers:
        layer.self_attn.sliding_window = 24
    assert not torch.allclose(short, model(windows(), use_cache=False).logits)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_gram_matrices_are_those_of_the_inputs_through_quantized_layers(true_sequential: bool) -> None:
    model = tiny.make_model("llama", torch.float32, ternary=False)
    decoder = find_decoder_layers(model)
    names = {id(linear): name for name, linear in decoder.named_linears().items()}
    weights = {name: linear.weight.detach().clone() for name, linear in decoder.named_linears().items()}

    def halve(W: np.ndarray, C: np.ndarray) -> np.ndarray:
        return W / 2

    passage = capture_inputs(model, decoder, windows())
    fitted = [
        matrix
        for layer in fit_layers(passage, halve, true_sequential=true_sequential)
        for matrix in layer.matrices
    ]
    assert {matrix.name for matrix in fitted} == set(names.values())

    # The same from whole passes: for every matrix, what comes before it is halved and the rest is not.
    groups = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    stage = {name: (layer_of(name), position_of(name, groups) if true_sequential else 0) for name in weights}
    for matrix in fitted:
        with torch.no_grad():
            for name, linear in decoder.named_linears().items():
                linear.weight.copy_(weights[name] / 2 if stage[name] < stage[matrix.name] else weights[name])
        expected = whole_model_gram(model, decoder.named_linears()[matrix.name])
        # float32 activations, and float32 products of a few dozen rows.
        np.testing.assert_allclose(matrix.gram, expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_matrices_that_read_one_input_share_one_gram_matrix() -> None:
    model = tiny.make_model("llama", torch.float32)
    decoder = find_decoder_layers(model)
    passage = capture_inputs(model, decoder, windows())
    layer = next(fit_layers(passage, keep))
    shared: dict[int, set[str]] = {}
    for matrix in layer.matrices:
        shared.setdefault(id(matrix.gram), set()).add(matrix.name.rpartition(".")[2])
    assert sorted(map(sorted, shared.values())) == [
        ["down_proj"],
        ["gate_proj", "up_proj"],
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
    ]
    assert [[name.rpartition(".")[2] for name in group] for group in layer.groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_the_model_stays_in_its_dtype_and_one_layer_at_a_time_is_float32() -> None:
    model = tiny.make_model("llama", torch.bfloat16)
    decoder = find_decoder_layers(model)
    passage = capture_inputs(model, decoder, windows())
    seen = []

    def look(W: np.ndarray, C: np.ndarray) -> np.ndarray:
        seen.append({p.dtype for p in model.parameters()})
        return W

    for _ in fit_layers(passage, look):
        assert {states.dtype for states in passage.hidden} == {torch.bfloat16}
    assert all(dtypes == {torch.bfloat16} for dtypes in seen)


def test_the_next_layer_sees_what_the_checkpoint_will_hold() -> None:
    """Weights in the model's dtype, not the finer ones that the method gave."""
    model = tiny.make_model("llama", torch.bfloat16, ternary=False)
    decoder = find_decoder_layers(model)
    passage = capture_inputs(model, decoder, windows())
    expected = [states.clone() for states in passage.hidden]
    steps = fit_layers(passage, lambda W, C: W * 1.2345)
    for index, _ in enumerate(steps):
        # The model now holds what was fitted, in its own dtype.
        again = Passage(decoder, expected, passage.calls, Compute())
        again.advance(again.enter(index))
        for states, wanted in zip(passage.hidden, expected, strict=True):
            assert torch.equal(states, wanted)


def test_gram_sum_keeps_digits_over_many_rows() -> None:
    X = torch.randn(3 * CHUNK_TOKENS + 100, 5, generator=torch.Generator().manual_seed(0)) + 3
    X[:, 4] = X[:, 3] * 1.001  # strongly correlated
    total = GramSum(5)
    for part in X.split(1111):
        total.add(part)
    exact = X.double().numpy().T @ X.double().numpy()
    # float32 products summed over a chunk: rounding grows at most with its length.
    found = total.finish()
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    assert np.array_equal(found, found.T)


def test_a_failure_names_the_matrix() -> None:
    model = tiny.make_model("llama")
    decoder = find_decoder_layers(model)
    passage = capture_inputs(model, decoder, windows())

    def fail(W: np.ndarray, C: np.ndarray) -> np.ndarray:
        if W.shape == (tiny.WIDTH, tiny.INNER):
            raise np.linalg.LinAlgError("is not positive definite")
        return W

    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.down_proj: is not positive definite"):
        next(fit_layers(passage, fail))


def test_inputs_that_are_not_finite_name_the_matrix() -> None:
    model = tiny.make_model("llama", torch.float32)
    decoder = find_decoder_layers(model)
    passage = capture_inputs(model, decoder, windows())
    passage.hidden[1][0, 3, 7] = torch.inf
    with pytest.raises(
        UserError, match=r"layers\.0\.self_attn\.q_proj: its inputs on the calibration text are not finite"
    ):
        next(fit_layers(passage, keep))


def test_a_model_that_changes_hidden_states_between_layers_is_refused() -> None:
    model = tiny.make_model("llama", torch.float32)
    decoder = find_decoder_layers(model)
    second = decoder.layers[1]
    original = second.forward
    second.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    second.forward = original
    with pytest.raises(UserError, match="does more between its decoder layers"):
        capture_inputs(model, decoder, windows())


def test_an_encoder_is_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertLMHeadModel(config).eval()
    with pytest.raises(UserError, match="depends on later tokens"):
        capture_inputs(model, find_decoder_layers(model), windows())
    config.is_decoder = True
    model = transformers.BertLMHeadModel(config).eval()
    capture_inputs(model, find_decoder_layers(model), windows())


def test_recording_leaves_the_layers_as_they_were() -> None:
    model = tiny.make_model("llama", torch.float32)
    decoder = find_decoder_layers(model)
    first, second = decoder.layers[0], decoder.layers[1]
    own = first.forward = lambda *args, **kwargs: type(first).forward(first, *args, **kwargs)
    capture_inputs(model, decoder, windows())
    assert first.forward is own
    assert "forward" not in vars(second)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in decoder.layers)


def test_after_a_failure_the_matrices_that_have_not_begun_are_not_begun() -> None:
    model = tiny.make_model("llama", torch.float32)
    decoder = find_decoder_layers(model)
    passage = capture_inputs(model, decoder, windows())
    begun = []

    def interrupt(W: np.ndarray, C: np.ndarray) -> np.ndarray:
        begun.append(W.shape)
        if len(begun) == 1:
            raise KeyboardInterrupt
        time.sleep(0.3)  # long enough for the failure to be seen
        return W

    with pytest.raises(KeyboardInterrupt):
        next(fit_layers(passage, interrupt))
    assert len(begun) <= 3


def test_a_matrix_that_is_not_used_is_refused() -> None:
    model = tiny.make_model("llama", torch.float32)
    decoder = find_decoder_layers(model)
    decoder.layers[0].mlp.spare = torch.nn.Linear(64, 64)
    decoder = find_decoder_layers(model)
    passage = capture_inputs(model, decoder, windows())
    with pytest.raises(UserError, match=r"mlp\.spare is not used"):
        next(fit_layers(passage, keep))


def layer_of(name: str) -> int:
    return int(name.split(".")[2])


def position_of(name: str, groups: list[list[str]]) -> int:
    return next(i for i, group in enumerate(groups) if name.rpartition(".")[2] in group)


def whole_model_gram(model: Any, linear: torch.nn.Linear) -> np.ndarray:
    rows = []
    handle = linear.register_forward_pre_hook(
        lambda module, args: rows.append(args[0].double().flatten(0, 1))
    )
    with torch.no_grad():
        for window in windows():
            model(window[None], use_cache=False)
    handle.remove()
    X = torch.cat(rows).numpy()
    return X.T @ X
