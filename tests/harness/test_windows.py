"""Windows cut from a text, and the BOS token that they begin with, against plain transformers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import processors

from harness import evaluate
from harness.calibration import capture
from harness.cli import EXIT_USAGE
from harness.errors import UserError
from harness.generate.chat import apply_template
from harness.models.folder import REPORT
from harness.models.original import Original
from harness.models.tokenizer import load_tokenizer
from harness.quantize import prepare
from harness.quantize.__main__ import main as quantize_main
from harness.text import Chat, Mixture, Text
from harness.windows import Tokens, beginning, calibration_windows, evaluation_windows, tokenize
from tests.harness import tiny
from tests.harness.conftest import SMALL

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]

SEQLEN = 24


def one_stream(length: int) -> Tokens:
    return Tokens((torch.arange(length),))


def test_calibration_windows_start_where_the_gptq_family_starts_them() -> None:
    tokens = one_stream(1000)
    windows = calibration_windows(tokens, nsamples=5, seqlen=100, seed=7)
    generator = random.Random(7)
    for window in windows:
        start = generator.randint(0, 1000 - 100 - 1)
        assert window.tolist() == list(range(start, start + 100))


def test_calibration_needs_one_token_more_than_a_window() -> None:
    assert calibration_windows(one_stream(11), 2, 10, 0).tolist() == [list(range(10))] * 2
    with pytest.raises(UserError, match=r"has 10 tokens.*at least 11"):
        calibration_windows(one_stream(10), 2, 10, 0)


def test_evaluation_windows_do_not_overlap_and_drop_the_rest() -> None:
    assert evaluation_windows(one_stream(25), 10, None).tolist() == [
        list(range(10)),
        list(range(10, 20)),
    ]
    assert len(evaluation_windows(one_stream(25), 10, 1)) == 1
    with pytest.raises(UserError, match="less than one window of 30"):
        evaluation_windows(one_stream(25), 30, None)


def test_tokens_are_exactly_what_the_tokenizer_gives() -> None:
    tokenizer = tiny.make_tokenizer()
    assert tokenize(Text("w5 w3 w90", ""), tokenizer).all().tolist() == [5, 3, 90]


TEMPLATE = "{% for m in messages %}{{ bos_token if loop.first }} {{ m.role }} {{ m.content }} {% endfor %}"
TURNS = [{"role": "w7", "content": "w8 w9"}, {"role": "w10", "content": "w11"}]


def test_conversations_are_written_by_the_chat_template() -> None:
    tokenizer = tiny.make_tokenizer()
    chat = Chat((TURNS, TURNS[:1]), "chat")
    with pytest.raises(UserError, match="chat: the model has no chat template"):
        tokenize(chat, tokenizer)
    tokenizer.chat_template = TEMPLATE
    # A tokenizer that adds BOS must not add it to what the template has written.
    post = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = post
    tokens = tokenize(chat, tokenizer)
    assert tokens.all().tolist() == [1, 7, 8, 9, 10, 11, 1, 7, 8, 9]
    assert beginning(tokens, tokenizer, None) == "<s> where the text or its chat template has it"
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"chat: the template failed: .*roles must alternate"):
        tokenize(chat, tokenizer)


@pytest.mark.parametrize("takes_text", [False, True])
def test_templates_of_images_and_text_get_the_content_of_messages_in_parts(takes_text: bool) -> None:
    """As LLaVA's, which writes nothing of a text, and as Qwen2-VL's, which takes both."""
    tokenizer = tiny.make_tokenizer()
    text = "{% if m.content is string %}{{ m.content }}{% endif %}" if takes_text else ""
    tokenizer.chat_template = (
        "{% for m in messages %} {{ m.role }} "
        "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}"
        f"{text}{{% endfor %}}"
    )
    chat = Chat((TURNS,), "chat")
    assert tokenize(chat, tokenizer).all().tolist() == [7, 8, 9, 10, 11]
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
    expected = tokenizer.apply_chat_template(parts, tokenize=False)
    original = Original(None, tokenizer, "the model")
    assert apply_template(original, TURNS) == tokenizer(expected)["input_ids"]


def test_the_template_of_a_processor_is_read_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    """As in models of images and text from before transformers wrote chat_template.jinja."""
    tiny.make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert load_tokenizer(tmp_path).chat_template == TEMPLATE
    (tmp_path / "chat_template.jinja").write_text("w3")
    assert load_tokenizer(tmp_path).chat_template == "w3"


def test_a_mixture_gives_each_text_its_share_of_the_windows() -> None:
    parts = ((0.7, Text(tiny.words(200, 1), "a")), (0.3, Text(" ".join(["w5"] * 100), "b")))
    tokens = tokenize(Mixture(parts), tiny.make_tokenizer())
    assert len(tokens) == 300
    windows = calibration_windows(tokens, nsamples=9, seqlen=10, seed=0)
    assert len(windows) == 9
    assert [bool((window == 5).all()) for window in windows] == [False] * 6 + [True] * 3  # 6.3 and 2.7
    # The first text has 20 windows; 29 in all are 20.3 and 8.7.
    windows = evaluation_windows(tokens, 10, None)
    assert [bool((window == 5).all()) for window in windows] == [False] * 20 + [True] * 9
    assert windows[:20].flatten().tolist() == tokens.streams[0].tolist()
    assert len(evaluation_windows(tokens, 10, 5)) == 5
    with pytest.raises(UserError, match=r"too few windows \(1\)"):
        evaluation_windows(tokens, 10, 1)
    with pytest.raises(UserError, match="has 100 tokens, less than one window of 150"):
        evaluation_windows(tokens, 150, None)


def save(kind: str, adds_bos: bool, folder: Path) -> Path:
    """A model with a tokenizer that does or does not begin a text with <s>."""
    tiny.save(tiny.make_model(kind, ternary=False), folder)
    if adds_bos:
        tokenizer = tiny.make_tokenizer()
        template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.backend_tokenizer.post_processor = template
        tokenizer.save_pretrained(folder)
    return folder


def by_transformers(folder: Path, text: str, every_window: bool) -> float:
    """Perplexity by transformers' own loss, with BOS in every window as in llama.cpp, or as tokenized."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids
    losses = []
    for start in range(0, len(ids) - SEQLEN + 1, SEQLEN):
        window = ids[start : start + SEQLEN]
        inputs = torch.tensor([[1, *window[1:]] if every_window else window])
        with torch.no_grad():
            losses.append(model(inputs, labels=inputs).loss.item())
    return math.exp(sum(losses) / len(losses))


CASES = [  # model, whether the tokenizer adds BOS, switches, whether every window begins with it, words
    ("gemma3", True, (), True, "every window begins with <s> in place of its first token"),
    ("gemma3", False, (), True, "every window begins with <s> in place of its first token"),
    ("gemma3", True, ("--bos", "as-tokenized"), False, "only the text begins with <s>"),
    ("gemma3", False, ("--bos", "as-tokenized"), False, "no BOS token"),
    ("llama", True, (), False, "only the text begins with <s>"),
    ("llama", False, (), False, "no BOS token"),
    ("llama", False, ("--bos", "every-window"), True, "every window begins with <s> in place"),
]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("kind", "adds_bos", "switches", "every_window", "words"), CASES)
def test_perplexity_is_that_of_transformers_and_says_how_windows_begin(
    kind: str,
    adds_bos: bool,
    switches: tuple[str, ...],
    every_window: bool,
    words: str,
    streamed: bool,
    words_file: Path,
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    folder = save(kind, adds_bos, tmp_path / "model")
    if streamed:
        monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    arguments = (folder, "--data", words_file, "--seqlen", SEQLEN, "--cpu", "--json", *switches)
    assert run_main(evaluate.main, *arguments) == 0
    result = json.loads(capsys.readouterr().out)
    expected = by_transformers(folder, words_file.read_text(), every_window)
    other = by_transformers(folder, words_file.read_text(), not every_window)
    # transformers averages losses in float32; the two ways are further apart.
    assert result["value"] == pytest.approx(expected, rel=1e-5)
    assert abs(other / expected - 1) > 1e-4
    assert f"; {words}" in result["protocol"]


def test_a_tokenizer_without_bos_is_told(
    words_file: Path, tmp_path: Path, run_main: Run, capsys: Capture
) -> None:
    folder = save("gemma3", False, tmp_path / "model")
    tokenizer = tiny.make_tokenizer()
    tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    arguments = (folder, "--data", words_file, "--seqlen", SEQLEN, "--cpu")
    assert run_main(evaluate.main, *arguments) == 0
    assert "; no BOS token; 400 tokens" in capsys.readouterr().out
    assert run_main(evaluate.main, *arguments, "--bos", "every-window") == EXIT_USAGE
    assert "--bos every-window: the tokenizer has no BOS token; drop --bos" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "every_window"), [("gemma3", True), ("llama", False)])
def test_windows_of_calibration_begin_as_those_of_evaluation(
    kind: str,
    every_window: bool,
    words_file: Path,
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """The recipe of the paper for llama; what Gemma is made for, for Gemma."""
    seen: list[torch.Tensor] = []

    def note(model: Any, decoder: Any, windows: torch.Tensor, *rest: Any) -> Any:
        seen.append(windows)
        return capture.capture_inputs(model, decoder, windows, *rest)

    monkeypatch.setattr(prepare, "capture_inputs", note)
    folder, out = save(kind, True, tmp_path / "model"), tmp_path / "out"
    arguments = (
        folder,
        "--out",
        out,
        "--calibration",
        words_file,
        "--eval",
        words_file,
        "--eval-seqlen",
        24,
        *SMALL,
    )
    assert run_main(quantize_main, *arguments) == 0
    ids = [1, *(int(word[1:]) for word in words_file.read_text().split())]
    generator = random.Random(0)
    for window in seen[-1].tolist():
        start = generator.randint(0, len(ids) - SEQLEN - 1)
        wanted = ids[start : start + SEQLEN]
        assert window == ([1, *wanted[1:]] if every_window else wanted)
    words = "every window begins with <s> in place of its first token" if every_window else "only the text"
    record = json.loads((out / REPORT).read_text())
    assert words in record["calibration"]["bos"]
    for when in ("before", "after"):
        assert words in record["perplexity"][when]["protocol"]
    assert f"words.txt as it is; {words}" in capsys.readouterr().out
    before = record["perplexity"]["before"]["value"]
    assert before == pytest.approx(by_transformers(folder, words_file.read_text(), every_window), rel=1e-5)
