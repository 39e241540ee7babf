"""Talk with a model through its chat template."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from harness.errors import UserError
from harness.generate.decode import Generated, Settings, context_length, decode
from harness.models.original import Original, summary
from harness.models.tokenizer import PROBE, chat_writer
from harness.signals import noted
from harness.text import require_unicode

Message = dict[str, str]

EXIT = "/exit"


def apply_template(original: Original, messages: list[Message]) -> list[int]:
    """Return the tokens of a conversation, ready for the model's next answer.

    Raises
    ------
    UserError
        If the model has no chat template, or its template fails.
    """
    tokenizer = original.tokenizer
    if not tokenizer.chat_template:
        raise UserError(f"{original.name} has no chat template; drop --chat")
    try:
        text = chat_writer(tokenizer)(messages, add_generation_prompt=True)
    except Exception as error:  # a template is a program: it can raise anything
        raise UserError(
            f"the chat template of {original.name} failed; fix it, or drop --chat: {summary(error)}"
        ) from None
    # The template adds the special tokens; the tokenizer must not add them again.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_tokens(original: Original) -> set[int]:
    """Return the tokens that end an answer.

    They are those of the model's generation settings, the tokenizer's end of text, and the special token that
    the chat template puts after an answer, which the settings of some models lack.
    """
    tokenizer = original.tokenizer
    listed = original.model.generation_config.eos_token_id
    ends = {*(listed if isinstance(listed, list | tuple) else [listed]), tokenizer.eos_token_id} - {None}
    if not tokenizer.chat_template:
        return ends
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": PROBE}]
    try:
        text = chat_writer(tokenizer)(turns)
    except Exception:  # a template for single questions, or a broken one, which `apply_template` reports
        return ends
    _, found, after = text.rpartition(PROBE)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    following = tokenizer.tokenize(after.lstrip())[:1] if found else []
    return ends | {tokenizer.convert_tokens_to_ids(token) for token in following if token in special}


class Conversation:
    """Messages between a user and a model, with the keys and values computed so far.

    Parameters
    ----------
    original : Original
        Model and tokenizer.
    settings : Settings
        How to generate each answer; an answer is shorter if the context has less room.
    """

    def __init__(self, original: Original, settings: Settings) -> None:
        self.original = original
        self.settings = settings
        self.ends = end_tokens(original)
        self.messages: list[Message] = []
        self.cache: Any = None
        self.cached: list[int] = []

    def answer(self, message: str) -> Generated:
        """Print the model's answer to a message. The first Ctrl-C ends the answer.

        Raises
        ------
        UserError
            If the message is not valid Unicode, if the context has no room for an answer, or as `decode`
            and `apply_template` do. The conversation is then as it was before the message.
        """
        require_unicode(message, "the message")
        messages = [*self.messages, {"role": "user", "content": message}]
        ids = apply_template(self.original, messages)
        positions = context_length(self.original)
        tokens = self.settings.tokens
        if positions:
            if len(ids) >= positions:
                raise UserError(
                    f"the context is full: with this message the conversation has {len(ids)} tokens, and "
                    f"{self.original.name} has {positions} positions; start a new conversation"
                )
            tokens = min(tokens, positions - len(ids))
        cache = self._cache_for(ids)
        with noted() as interrupted:
            given = decode(
                self.original, ids, replace(self.settings, tokens=tokens), self.ends, cache, interrupted
            )
        self.messages = [*messages, {"role": "assistant", "content": given.text}]
        self.cache, self.cached = given.cache, given.ids[:-1]
        return given

    def _cache_for(self, ids: list[int]) -> Any:
        """Return the keys and values of the first tokens of a prompt, as far as they are known.

        The template may write an answer otherwise than the model did (without its thoughts, say), and text
        may be split into other tokens. Keys and values after the first difference are dropped. A cache with
        sliding windows or recurrent states cannot drop its last tokens, and then nothing is reused.
        """
        cache, self.cache = self.cache, None  # `decode` changes it, and may fail
        if cache is None:
            return None
        pairs = zip(self.cached, ids[:-1], strict=False)  # the last token must be left to compute
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if known < len(self.cached):
            if not isinstance(cache, DynamicCache) or {*map(type, cache.layers)} != {DynamicLayer}:
                return None
            cache.crop(known - len(self.cached))
        return cache if known else None


def converse(original: Original, settings: Settings) -> None:
    """Hold a conversation at a terminal until an empty line, ``/exit`` or Ctrl-D."""
    with suppress(ImportError):  # there is none on Windows
        import readline  # noqa: F401 - `input` edits lines and recalls earlier ones with it

    conversation = Conversation(original, settings)
    apply_template(original, [{"role": "user", "content": PROBE}])  # fail before the first question
    print(f"Ctrl-C ends an answer; an empty line, {EXIT} or Ctrl-D ends the conversation.", file=sys.stderr)
    while message := _ask():
        try:
            answer = conversation.answer(message)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        if answer.unfinished:
            full = len(answer.ids) == context_length(original)
            why = "the context is full" if full else f"--tokens {settings.tokens}"
            print(f"[the answer was cut: {why}]", file=sys.stderr)


def _ask() -> str:
    try:
        line = input("> ").strip()
    except EOFError:
        print()
        return ""
    return "" if line == EXIT else line
