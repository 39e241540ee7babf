"""The server answers OpenAI's own client with the model's text, and ends in one line."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import harness
from harness.cli import EXIT_USAGE
from harness.hf import open_model
from harness.serve import __main__ as serve
from tests.harness.export import checkpoints

Run = Callable[..., int]

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}assistant:"
MESSAGES: Any = [{"role": "user", "content": "jump"}]


@pytest.fixture(scope="module")
def folder(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with a chat template, and with 256 positions."""
    folder = shutil.copytree(plain, tmp_path_factory.mktemp("served") / "tiny-ternary")
    tokenizer = checkpoints.byte_level()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[Any, subprocess.Popen[str]]]:
    """OpenAI's client of a server that runs."""
    reason = "needs the extra serve: pip install '.[serve]'"
    openai = pytest.importorskip("openai", reason=reason)
    pytest.importorskip("uvicorn", reason=reason)
    with subprocess.Popen(
        [sys.executable, "-m", "harness.serve", folder, "--cpu", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert line.startswith("serving tiny-ternary at http://127.0.0.1:")
            url = line.split()[3].rstrip(",")
            yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60), process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[[str, int], str]:
    """The greedy continuation of a text, each token from a pass over all before it."""
    model, tokenizer = harness.load(folder), checkpoints.byte_level()

    def text(prompt: str, count: int) -> str:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        new: list[int] = []
        while len(new) < count and 2 not in new:
            with torch.no_grad():
                new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        return tokenizer.decode(new, skip_special_tokens=True)

    return text


def test_a_completion_is_the_model_s_text(server: Any, expected: Callable[[str, int], str]) -> None:
    given = server[0].completions.create(model="tiny-ternary", prompt="foxes", max_tokens=9, temperature=0)
    assert given.choices[0].text == expected("foxes", 9)
    assert given.usage.completion_tokens <= 9


def test_a_chat_is_the_model_s_answer(server: Any, expected: Callable[[str, int], str]) -> None:
    chat = server[0].chat.completions
    text = expected("user: jump</s>assistant:", 9)
    given = chat.create(model="tiny-ternary", messages=MESSAGES, max_tokens=9, temperature=0)
    assert given.choices[0].message.content == text
    stream = list(
        chat.create(model="tiny-ternary", messages=MESSAGES, max_tokens=9, temperature=0, stream=True)
    )
    # A stream leaves out a last character of which bytes are missing.
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text.rstrip("\ufffd")
    assert len(stream) > 3
    assert stream[-1].choices[0].finish_reason == given.choices[0].finish_reason


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_stop_text_is_left_out(
    kind: str, stream: bool, server: Any, expected: Callable[[str, int], str]
) -> None:
    """And an answer that ends in the beginning of one is whole."""
    text = expected({"chat": "user: jump</s>assistant:", "completion": "foxes"}[kind], 24).rstrip("\ufffd")
    assert len(text) > 8

    def answer(stop: Any) -> str:
        asked: Any = {"model": "tiny-ternary", "max_tokens": 24, "temperature": 0, "stop": stop}
        asked |= {"stream": stream}
        if kind == "chat":
            given = server[0].chat.completions.create(messages=MESSAGES, **asked)
            if not stream:
                return given.choices[0].message.content
            return "".join(chunk.choices[0].delta.content or "" for chunk in given)
        given = server[0].completions.create(prompt="foxes", **asked)
        return "".join(chunk.choices[0].text for chunk in given) if stream else given.choices[0].text

    middle = text[4:7]
    assert answer(middle) == answer([middle]) == answer(["never", middle]) == text.split(middle)[0]
    assert answer(text[-2:] + "never").rstrip("\ufffd") == text


def test_a_temperature_samples(server: Any) -> None:
    ask = lambda seed: server[0].completions.create(  # noqa: E731
        model="tiny-ternary", prompt="foxes", max_tokens=20, temperature=5, seed=seed
    )
    assert ask(1).choices[0].text == ask(1).choices[0].text != ask(2).choices[0].text


def test_the_model_s_name_is_listed(server: Any) -> None:
    assert [model.id for model in server[0].models.list()] == ["tiny-ternary"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"model": "other", "prompt": "x"}, "Server is pinned to 'tiny-ternary'; requested 'other'"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "~" * 300}, "the prompt has 300 tokens, and the model 256 positions; shorten it"),
        ({"prompt": "x", "max_tokens": -1}, "the request cannot be answered: ValueError"),
        (
            {"messages": []},
            "the request cannot be answered: ValueError: Cannot apply chat template to an empty",
        ),
        ({"messages": [{"content": "x"}]}, "the request cannot be answered: KeyError: 'role'"),
        ({"prompt": "x", "n": 2}, "n is not supported; drop it from the request"),
        ({"prompt": "x", "echo": True}, "echo is not supported"),
        ({"messages": MESSAGES, "logprobs": True}, "logprobs is not supported"),
        ({"prompt": "x", "logprobs": 0}, "logprobs is not supported"),
        ({"prompt": "x", "frequency_penalty": -1}, "frequency_penalty is not supported"),
        ({"messages": MESSAGES, "top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"prompt": "x", "suffix": "y"}, "suffix is not supported"),
        ({"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"messages": MESSAGES, "tool_choice": "required"}, "tool_choice is not supported"),
        ({"messages": MESSAGES, "modalities": ["text", "audio"]}, "modalities is not supported"),
        ({"prompt": "x", "stop": ""}, "stop must be a text, or a list of at most 4, none of them empty"),
        ({"prompt": "x", "stop": ["a", ""]}, "stop must be a text"),
        ({"prompt": "x", "stop": list("abcde")}, "stop must be a text"),
        ({"messages": MESSAGES, "stop": [3]}, "stop must be a text"),
    ],
)
def test_requests_that_cannot_be_answered_say_why(server: Any, request_: Any, message: str) -> None:
    import openai

    client = server[0].chat.completions if "messages" in request_ else server[0].completions
    with pytest.raises(openai.BadRequestError) as error:
        client.create(**{"model": "tiny-ternary", **request_})
    assert message in str(error.value)
    assert error.value.type == "invalid_request_error"
    named = message.split()[0]
    assert error.value.param == (named if named in request_ else None)


def test_fields_that_ask_for_nothing_are_no_reason_to_refuse(server: Any) -> None:
    chat = server[0].chat.completions
    nothing: Any = {
        "n": 1,
        "logprobs": False,
        "top_p": 1,
        "stop": [],
        "logit_bias": {},
        "tool_choice": "auto",
    }
    given = chat.create(model="tiny-ternary", messages=MESSAGES, max_tokens=2, **nothing)
    assert len(given.choices) == 1


def test_what_transformers_ignores_is_refused_or_asks_for_nothing_of_the_model() -> None:
    from transformers.cli.serving.chat_completion import UNUSED_CHAT_COMPLETION_FIELDS

    from harness.serve.app import IGNORED

    harmless = {"metadata", "service_tier", "store", "stream_options", "user"}
    assert UNUSED_CHAT_COMPLETION_FIELDS - harmless <= IGNORED.keys()


def test_every_error_has_the_form_of_openai_s(server: Any) -> None:
    url = str(server[0].base_url)
    json_ = {"Content-Type": "application/json"}
    for path, body in (
        ("completions", b"no json"),
        ("completions", b"[]"),
        ("completions", None),
        ("no", None),
        ("models", b"{}"),  # which has no POST
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(urllib.request.Request(url + path, body, json_), timeout=60)
        assert 400 <= error.value.code < 500
        found = json.load(error.value)["error"]
        assert found["message"]
        assert found["type"] == "invalid_request_error"
        assert {"param", "code"} <= found.keys()


def test_a_failure_has_that_form_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    testclient = pytest.importorskip("fastapi.testclient", reason="needs the extra serve and httpx")
    from harness.serve import app

    original = open_model(str(folder))
    monkeypatch.setattr(original.model, "generate", lambda **named: 1 / 0)
    served = app.build_app(original, "tiny", app.Generator(original))
    client = testclient.TestClient(served, raise_server_exceptions=False)
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "ZeroDivisionError" in answer.json()["error"]["message"]


def test_an_answer_ends_where_the_context_does(server: Any) -> None:
    given = server[0].completions.create(model="tiny-ternary", prompt="~" * 250, max_tokens=99, temperature=0)
    assert given.usage.total_tokens == 256


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/responses"])
def test_clients_cannot_change_the_model(path: str, server: Any) -> None:
    import openai

    with pytest.raises(openai.NotFoundError):
        server[0].post(path.removeprefix("/v1"), cast_to=object, body={"model": "other"})


def test_a_signal_ends_the_server_in_one_line_while_it_answers(server: Any) -> None:
    """The last test of this server."""
    import openai

    client, process = server
    stream = client.completions.create(model="tiny-ternary", prompt="foxes", stream=True, logit_bias=None)
    next(iter(stream))
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (143, "", "terminated\n")
    with pytest.raises(openai.APIError):
        list(stream)


def test_what_cannot_be_served_is_told_in_one_line(
    folder: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(serve, "is_serve_available", lambda: True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in (
            ((folder, "--port", port), f"cannot serve at 127.0.0.1, port {port}: Address already in use; "),
            ((folder, "--host", "no.such.host.invalid"), "cannot serve at no.such.host.invalid, port 8000: "),
            ((tmp_path, "--port", 0), "config.json"),
        ):
            assert run_main(serve.main, *arguments, "--cpu") == EXIT_USAGE
            error = capsys.readouterr().err
            assert error.startswith("error: ")
            assert message in error
            assert error.count("\n") == 1


def test_the_extra_is_named_where_it_is_missing(
    folder: Path, run_main: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    assert run_main(serve.main, folder) == EXIT_USAGE
    assert (
        "serving requires more packages; run pip install '.[serve]' in the clone" in capsys.readouterr().err
    )
