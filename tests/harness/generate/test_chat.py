"""A conversation gives the answers that the model would give to all its messages at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from harness.errors import UserError
from harness.generate import __main__ as generate
from harness.generate.chat import Conversation, apply_template, converse, end_tokens
from harness.generate.decode import Settings
from harness.models.original import Original
from tests.harness import tiny

Run = Callable[..., int]

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' if m.role == 'user' else 'w3' }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}w3{% endif %}"
)
# Leaves the answers out, as templates leave out thoughts.
FORGETFUL = TEMPLATE.replace("m.content", "(m.content if m.role == 'user' else 'w4')")


def talker(kind: str = "llama", template: str = TEMPLATE) -> Original:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    return Original(tiny.make_model(kind, torch.float32), tokenizer, "the model")


def greedy(model: Any, ids: list[int], count: int, ends: set[int]) -> list[int]:
    """New tokens, each from a pass over all before it."""
    new: list[int] = []
    while len(new) < count and not set(new) & ends:
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return new


@pytest.fixture
def computed() -> Iterator[Callable[[Any], list[int]]]:
    """Counts the tokens that every pass of a model computes."""
    hooks = []

    def count(model: Any) -> list[int]:
        counts: list[int] = []
        note = lambda module, arguments: counts.append(arguments[0].shape[1])  # noqa: E731
        hooks.append(model.get_input_embeddings().register_forward_pre_hook(note))
        return counts

    yield count
    for hook in hooks:
        hook.remove()


# Mistral has sliding windows of 8 tokens, whose caches forget.
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL])
def test_every_answer_is_that_to_the_whole_conversation(kind: str, template: str) -> None:
    original = talker(kind, template)
    conversation = Conversation(original, Settings(6))
    messages = []
    for message in ("w5 w6", "w7", "w8 w9 w10", "w11"):
        messages.append({"role": "user", "content": message})
        ids = apply_template(original, messages)
        given = conversation.answer(message)
        assert given.ids == ids + greedy(original.model, ids, 6, {2})
        messages.append({"role": "assistant", "content": given.text})
    assert conversation.messages == messages


def test_what_was_computed_before_is_not_computed_again(computed: Callable[[Any], list[int]]) -> None:
    original = talker()
    conversation = Conversation(original, Settings(6))
    first = conversation.answer("w5 w6").ids
    counts = computed(original.model)
    second = conversation.answer("w7").ids
    whole = apply_template(original, conversation.messages[:3])
    assert whole[: len(first)] == first
    known = len(first) - 1  # the last token of an answer was never read
    assert counts == [len(whole) - known] + [1] * (len(second) - len(whole) - 1)


def test_an_answer_ends_at_the_token_that_the_template_puts_after_it() -> None:
    original = talker()
    ids = apply_template(original, [{"role": "user", "content": "w5 w6"}])
    new = greedy(original.model, ids, 6, {2})
    last = next(token for token in new if token != new[0])
    after = f"{{{{ '</s>' if m.role == 'user' else 'w{last}' }}}}"
    original.tokenizer.chat_template = TEMPLATE.replace("</s>", after)
    assert end_tokens(original) == {2}  # any word may follow an answer
    original.tokenizer.add_special_tokens({"additional_special_tokens": [f"w{last}"]})
    assert end_tokens(original) == {2, last}
    given = Conversation(original, Settings(6)).answer("w5 w6")
    assert given.ids == ids + new[: new.index(last) + 1]
    assert not given.unfinished
    assert f"w{last}" not in given.text.split()


def test_all_end_tokens_of_the_settings_end_an_answer() -> None:
    original = talker(template=FORGETFUL)
    original.model.generation_config.eos_token_id = [7, 9]
    assert end_tokens(original) == {2, 7, 9}
    original.tokenizer.chat_template = "{{ raise_exception('only one question') }}"
    assert end_tokens(original) == {2, 7, 9}


def test_ctrl_c_ends_the_answer_and_not_the_conversation() -> None:
    original = talker()
    conversation = Conversation(original, Settings(20))
    passes = 0

    def interrupt(*arguments: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        hook = original.model.register_forward_pre_hook(interrupt)
        ids = apply_template(original, [{"role": "user", "content": "w5"}])
        assert conversation.answer("w5").ids == ids + greedy(original.model, ids, 3, set())
        hook.remove()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        given = conversation.answer("w6")
        ids = apply_template(original, conversation.messages[:3])
        assert given.ids == ids + greedy(original.model, ids, 20, {2})
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_full_context_is_told_and_leaves_the_conversation_as_it_was() -> None:
    original = talker()
    original.model.config.max_position_embeddings = 14
    conversation = Conversation(original, Settings(40))
    given = conversation.answer("w5 w6")  # five tokens with the template's
    assert given.unfinished
    assert len(given.ids) == 14
    messages = list(conversation.messages)
    with pytest.raises(
        UserError, match=r"the context is full: with this message .* has 14 positions; start a new"
    ):
        conversation.answer("w7")
    assert conversation.messages == messages


def test_a_terminal_holds_a_conversation(
    run_main: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = talker()
    monkeypatch.setattr(generate, "open_model", lambda source, *device, **options: original)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for end in ("", "/exit", EOFError()):
        lines = iter(["w5 w6", "w7 \udcff", "w7", end, "w8"])

        def ask(prompt: str, lines: Any = lines) -> str:
            line = next(lines)
            if isinstance(line, Exception):
                raise line
            return line

        monkeypatch.setattr("builtins.input", ask)
        assert run_main(generate.main, "--chat", "--cpu", "--tokens", "4") == 0
        assert next(lines) == "w8"
        captured = capsys.readouterr()
        twin = Conversation(original, Settings(4))
        twin.answer("w5 w6")
        twin.answer("w7")
        assert captured.out.rstrip() == capsys.readouterr().out.rstrip()
        assert "error: the message is not valid Unicode: character 3 is U+DCFF" in captured.err
        assert "[the answer was cut: --tokens 4]" in captured.err


def test_without_a_template_there_is_no_conversation() -> None:
    original = talker()
    original.tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template; drop --chat"):
        converse(original, Settings(4))
