"""What harness.generate gives the model to read, what ends its text, and how it ends where that fails."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from harness.cli import EXIT_USAGE
from harness.generate import __main__ as generate
from harness.generate.decode import Printer, Settings, decode
from harness.models.original import Original
from tests.harness import tiny
from tests.harness.export import checkpoints

Run = Callable[..., int]

# The tiny tokenizer has a word a token: 1 is <s>, 2 is </s>.
CHAT = "{{ bos_token }} w9 {{ messages[0].content }} {{ eos_token }}"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Original:
    """What the program loads where no model is named: small, with a tokenizer that begins with <s>."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.chat_template = CHAT
    original = Original(tiny.make_model("llama"), tokenizer, "the model")
    monkeypatch.setattr(generate, "open_model", lambda source, *device, **options: original)
    return original


@pytest.fixture
def read(model: Original, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens that the model is given at every call."""
    seen: list[list[int]] = []

    def note(input_ids: torch.Tensor, **options: Any) -> Any:
        seen.append(input_ids[0].tolist())
        return SimpleNamespace(sequences=input_ids, past_key_values=None)

    monkeypatch.setattr(model.model, "generate", note)
    return seen


def test_a_template_s_special_tokens_are_not_added_once_more(read: list[list[int]], run_main: Run) -> None:
    for chat in ((), ("--chat",)):
        assert run_main(generate.main, "--prompt", "w5 w6", "--cpu", *chat) == 0
    assert read == [[1, 5, 6], [1, 9, 5, 6, 2]]


@pytest.mark.parametrize("text", [b"w5 w6", b"w5 w6\n", b"w5 w6\r\n"])
def test_a_prompt_is_read_from_a_pipe(
    text: bytes, read: list[list[int]], run_main: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for chat in ((), ("--chat",)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert run_main(generate.main, "--cpu", *chat) == 0
    assert read == [[1, 5, 6], [1, 9, 5, 6, 2]]


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (b"", (), "the prompt is empty"),
        (b"w5 \xff", (), "the prompt on standard input is not UTF-8 text: invalid start byte at byte 3"),
        (None, (), "there is no prompt; pass --prompt TEXT, pipe it in, or talk to the model with --chat"),
        (b"w5", ("--stop", ""), "--stop must not be empty"),
        (b"w5", ("--compile",), "--compile is for a CUDA GPU, and this runs on the CPU; drop it"),
        (
            b"w5",
            ("--dense",),
            "the embedded model is not a ternary checkpoint: its weights are dense already",
        ),
    ],
)
def test_what_cannot_be_answered_is_told_before_a_model_is_loaded(
    text: bytes | None,
    arguments: tuple[str, ...],
    message: str,
    model: Original,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    monkeypatch.setattr(sys, "stdin", None if text is None else io.TextIOWrapper(io.BytesIO(text)))
    assert run_main(generate.main, "--cpu", *arguments) == EXIT_USAGE
    assert message in capsys.readouterr().err


def test_text_ends_before_a_stop_text_wherever_tokens_begin(capsys: pytest.CaptureFixture[str]) -> None:
    model = transformers.AutoModelForCausalLM.from_config(checkpoints.config_of("tied")).eval()
    original = Original(model, checkpoints.byte_level(), "the model")

    def printed(*stop: str) -> str:
        generated = decode(original, [5, 6, 7], Settings(24, stop=stop), ends={-1})
        text = capsys.readouterr().out
        assert text == generated.text + "\n"
        return generated.text

    text = printed()
    assert len(text) > 20
    for length in (1, 2, 5, 11):
        for begin in range(0, len(text) - length, 5):
            stop = text[begin : begin + length]
            assert printed(stop) == text.split(stop)[0]
            assert printed("no such text", text[-3:], stop) == min(
                text.split(stop)[0], text.split(text[-3:])[0], key=len
            )


def test_what_may_begin_a_stop_text_is_held_back(capsys: pytest.CaptureFixture[str]) -> None:
    text, stops = "an ananas and a banana", ("anas", "and b", "a ban", "ana", "nan")
    for stop in itertools.chain.from_iterable(itertools.combinations(stops, count) for count in (0, 1, 2)):
        for first, second in itertools.combinations(range(len(text)), 2):
            printer = Printer(None, stop)
            printer.on_finalized_text(text[:first])
            printer.on_finalized_text(text[first:second])
            printer.on_finalized_text(text[second:], stream_end=True)
            assert (
                capsys.readouterr().out
                == min((text.split(each)[0] for each in stop), key=len, default=text) + "\n"
            )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no messages\nof users') }}", "TemplateError: no messages of users"),
        ("{% if %}", "TemplateSyntaxError: "),
        ("{{ messages[0].content + 1 }}", "TypeError: "),
    ],
)
def test_a_template_that_fails_is_told_in_one_line(
    template: str, message: str, model: Original, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    model.tokenizer.chat_template = template
    assert run_main(generate.main, "--prompt", "w5", "--cpu", "--chat") == EXIT_USAGE
    error = capsys.readouterr().err
    assert "the chat template of the model failed; fix it, or drop --chat: " + message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("setting", ["eos_token_id", "repetition_penalty"])
def test_settings_that_are_none_are_told_in_one_line(
    setting: str, quantized: Path, run_main: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(quantized, tmp_path / "folder")
    (folder / "generation_config.json").write_text(json.dumps({setting: "x"}))
    assert run_main(generate.main, folder, "--prompt", "w5", "--tokens", 2, "--cpu") == EXIT_USAGE
    error = capsys.readouterr().err
    assert f"{folder} cannot generate: " in error
    assert "check the settings in its generation_config.json: {" in error
    assert f"'{setting}': 'x'" in error
    assert error.count("\n") == 1


def test_a_model_that_is_read_layer_by_layer_cannot_write(
    run_main: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    folder = tiny.save(tiny.make_model("llama"), tmp_path / "model")
    assert run_main(generate.main, folder, "--prompt", "w5", "--cpu") == EXIT_USAGE
    assert "is too large for the memory of this machine" in capsys.readouterr().err
