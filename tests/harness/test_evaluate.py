"""Perplexity against its definition, and the command line."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from harness import evaluate, perplexity, text
from harness.cli import EXIT_USAGE
from harness.compute import HOST, Compute
from harness.files import json_text
from harness.models.decoder import find_decoder_layers
from harness.models.original import Original
from tests.harness import tiny

Run = Callable[..., int]


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    model = tiny.make_model("opt", torch.float32)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    windows = torch.randint(3, tiny.VOCABULARY, (3, 20))
    result = perplexity.measure(model, windows, 60, "words")
    # Cross-entropy is taken in float32.
    assert result.value == pytest.approx(tiny.VOCABULARY, rel=1e-5)


@pytest.mark.parametrize("seqlen", [12, 2 * perplexity.LOGIT_ROWS + 3])
def test_perplexity_is_the_exponential_of_the_mean_of_the_windows(seqlen: int) -> None:
    model = tiny.make_model("llama", torch.float64, ternary=False)
    windows = torch.randint(3, tiny.VOCABULARY, (3, seqlen))
    means = []
    for window in windows:
        with torch.no_grad():
            logits = model(window[None]).logits[0]
        losses = [
            math.log(sum(math.exp(v) for v in logits[i].tolist())) - logits[i, window[i + 1]].item()
            for i in range(seqlen - 1)
        ]
        means.append(sum(losses) / len(losses))
    result = perplexity.measure(model, windows, 0, "words")
    # Cross-entropy is taken in float32.
    assert result.value == pytest.approx(math.exp(sum(means) / 3), rel=1e-5)


@pytest.mark.parametrize("kind", sorted(tiny.CONFIGS))
def test_layer_by_layer_the_perplexity_is_the_same(kind: str) -> None:
    model = tiny.make_model(kind, torch.bfloat16, ternary=False)
    windows = torch.randint(3, tiny.VOCABULARY, (3, 20))
    layers = []
    result = perplexity.measure_by_layers(
        model, find_decoder_layers(model), windows, 60, "words", Compute(), lambda: layers.append(1)
    )
    assert result == perplexity.measure(model, windows, 60, "words")
    assert len(layers) == 3


def test_a_model_that_does_not_fit_on_the_device_is_measured_layer_by_layer() -> None:
    model = tiny.make_model("qwen3", torch.bfloat16, ternary=False)
    original = Original(model, tiny.make_tokenizer(), "tiny")
    stream = text.Text(tiny.words(100), "words", None)
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    logits = 8 * 20 * tiny.VOCABULARY
    large, small = (Compute(HOST, None, memory=memory) for memory in (int(1.11 * weights) + logits, weights))
    assert large.holds(model, 20)
    assert not small.holds(model, 20)
    whole, by_layers = (perplexity.measure_on(original, stream, 20, 3, compute) for compute in (large, small))
    assert whole == by_layers


def test_measuring_leaves_a_float16_model_as_it_was() -> None:
    model = tiny.make_model("llama", torch.float16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = perplexity.measure(model, torch.randint(3, 90, (1, 12)), 12, "words")
    assert result.protocol.endswith("computed in float16")
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float16
        assert torch.equal(value, before[name])


def test_a_perplexity_beyond_all_numbers_is_infinite() -> None:
    model = tiny.make_model("opt", torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity.measure(model, torch.randint(3, 90, (1, 12)), 12, "words").value == math.inf


def test_originals_and_ternary_checkpoints_are_measured_alike(
    llama: Path, quantized: Path, words_file: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    values = []
    for model in (llama, quantized, (quantized, "--packed")):
        options = model if isinstance(model, tuple) else (model,)
        arguments = (*options, "--data", words_file, "--seqlen", "50", "--windows", "3", "--json")
        assert run_main(evaluate.main, *arguments) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["windows"] == 3
        assert "400 tokens, 3 of 8 windows of 50 without overlap" in result["protocol"]
        values.append(result["value"])
    assert values[0] == pytest.approx(values[1])  # weights on the grid: the same model
    assert values[1] == values[2]


def test_text_that_gives_no_tokens_is_refused(
    llama: Path, tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[^w0-9 ]"}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "text.txt").write_text("\u65e5\u672c")
    assert run_main(evaluate.main, folder, "--data", tmp_path / "text.txt", "--seqlen", "50") == EXIT_USAGE
    assert "less than one window of 50" in capsys.readouterr().err


def test_the_protocol_is_printed_with_the_number(
    llama: Path, words_file: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(evaluate.main, llama, "--data", words_file, "--seqlen", "50") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("perplexity ")
    assert "words.txt as it is; no BOS token; 400 tokens, 8 of 8 windows of 50" in printed


def test_perplexities_that_are_no_numbers_are_json_all_the_same() -> None:
    assert json.loads(json_text({"a": [math.inf, -math.inf], "b": math.nan, "c": 1.5})) == {
        "a": ["inf", "-inf"],
        "b": "nan",
        "c": 1.5,
    }


@pytest.mark.parametrize("seqlen", ["1", "0", "x"])
def test_windows_that_predict_nothing_are_refused(
    seqlen: str, words_file: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(evaluate.main, "--data", words_file, "--seqlen", seqlen) == EXIT_USAGE
    assert "argument --seqlen: must be" in capsys.readouterr().err


def test_text_shorter_than_a_window_is_refused(
    llama: Path, words_file: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(evaluate.main, llama, "--data", words_file) == EXIT_USAGE
    assert "400 tokens, less than one window of 2048" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--data", "w3 " * 100), ("x" * 300, "--data", "builtin")])
def test_what_is_too_long_to_be_a_path_is_refused_in_one_line(
    arguments: tuple[str, ...], run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(evaluate.main, *arguments) == EXIT_USAGE
    error = capsys.readouterr().err.strip()
    assert error.endswith("File name too long")
    assert "\n" not in error


def test_a_lack_of_memory_ends_in_a_sentence(
    llama: Path,
    words_file: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(perplexity, "mean_loss", lambda *arguments: torch.empty(1 << 60))
    assert run_main(evaluate.main, llama, "--data", words_file, "--seqlen", "24", "--cpu") == EXIT_USAGE
    assert "this machine is out of memory; free some" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_has_no_perplexity(
    dtype: torch.dtype, words_file: Path, tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its layers see the token to be predicted, so that the number would look far too good."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = transformers.BertConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=64, **sizes)
    for is_decoder in (True, False):
        config.is_decoder = is_decoder
        torch.manual_seed(0)
        model = transformers.BertLMHeadModel(config).to(dtype)
        folder = tiny.save(model, tmp_path / f"decoder-{is_decoder}")
        code = run_main(evaluate.main, folder, "--data", words_file, "--seqlen", "24", "--cpu")
        assert code == (0 if is_decoder else EXIT_USAGE)
    assert "not a causal language model" in capsys.readouterr().err
