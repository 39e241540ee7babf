"""Windows of tokens: cut from text for calibration and evaluation, and how they begin.

The GPTQ family tokenizes a text as a whole, so that at most its first window begins with a BOS token, and its
published perplexities are measured so. Gemma models break down without one. Who reports their perplexity puts
it at the start of every window: llama.cpp and AutoGPTQ in place of the first token, for all models with a BOS
token; the LM evaluation harness for those with "gemma" in their type. Here, Gemma's windows of calibration
and evaluation begin with it, in place of their first token; other models' are as the GPTQ family has them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from harness.errors import UserError
from harness.models.original import summary
from harness.models.tokenizer import chat_writer
from harness.text import AnyText, Chat, Mixture, Text
from harness.words import counted

# Which windows begin with a BOS token.
AUTO, EVERY_WINDOW, AS_TOKENIZED = BOS_CHOICES = ("auto", "every-window", "as-tokenized")


@dataclass(frozen=True)
class Tokens:
    """Tokens of a text: one or more streams, each (tokens,) int64, with its share of the windows."""

    streams: tuple[torch.Tensor, ...]
    shares: tuple[float, ...] = (1.0,)

    def __len__(self) -> int:
        return sum(map(len, self.streams))

    def all(self) -> torch.Tensor:
        """All tokens, (tokens,)."""
        return torch.cat(self.streams)

    def divide(self, windows: int) -> list[int]:
        """Divide windows among the streams by their shares; the largest remainders get what is left."""
        exact = [share * windows for share in self.shares]
        counts = [int(count) for count in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
        for index in by_remainder[: windows - sum(counts)]:
            counts[index] += 1
        return counts


def tokenize(text: AnyText, tokenizer: Any) -> Tokens:
    """Tokenize whole streams, with the special tokens that the tokenizer, or a chat template, adds.

    Raises
    ------
    UserError
        If the text holds conversations, and the tokenizer has no chat template, or it fails.
    """
    if isinstance(text, Mixture):
        shares, parts = zip(*text.parts, strict=True)
        return Tokens(tuple(_stream(part, tokenizer) for part in parts), shares)
    return Tokens((_stream(text, tokenizer),))


def _stream(text: Text | Chat, tokenizer: Any) -> torch.Tensor:
    if isinstance(text, Text):
        return tokenizer(text.stream, return_tensors="pt", verbose=False).input_ids[0]
    if not tokenizer.chat_template:
        raise UserError(
            f"{text.protocol}: the model has no chat template; use its instruct variant, or plain text"
        )
    try:
        write = chat_writer(tokenizer)
        written = [write(list(c)) for c in text.conversations]
    except Exception as error:  # a template is a program: it can raise anything
        raise UserError(f"{text.protocol}: the template failed: {summary(error)}") from None
    # The template writes the special tokens; the tokenizer must not add them again.
    ids = tokenizer("".join(written), return_tensors="pt", verbose=False, add_special_tokens=False).input_ids
    return ids[0]


def calibration_windows(
    tokens: Tokens, nsamples: int, seqlen: int, seed: int, bos: int | None = None
) -> torch.Tensor:
    """Draw windows at random starts, (nsamples, seqlen), as the GPTQ family does; `bos` as `bos_of` says.

    Raises
    ------
    UserError
        If a stream has fewer than seqlen + 1 tokens, or gets no window.
    """
    generator = random.Random(seed)
    windows = []
    for stream, count in zip(tokens.streams, _counts(tokens, nsamples), strict=True):
        if len(stream) < seqlen + 1:
            raise UserError(
                f"the calibration text has {counted(len(stream), 'token')}, but windows of {seqlen} need "
                f"at least {seqlen + 1}; use more text or a smaller --seqlen"
            )
        starts = [generator.randint(0, len(stream) - seqlen - 1) for _ in range(count)]
        windows += [stream[s : s + seqlen] for s in starts]
    return _begun(torch.stack(windows), bos)


def evaluation_windows(
    tokens: Tokens, seqlen: int, limit: int | None, bos: int | None = None
) -> torch.Tensor:
    """Cut consecutive windows that do not overlap, (windows, seqlen), and drop the remainder.

    Of several streams, as many windows are cut as their shares allow. `bos`, if given, takes the place of
    every window's first token, as `bos_of` says.

    Raises
    ------
    UserError
        If a stream has fewer than seqlen tokens, or gets no window.
    """
    available = [len(stream) // seqlen for stream in tokens.streams]
    for stream, most in zip(tokens.streams, available, strict=True):
        if most == 0:
            raise UserError(
                f"the evaluation text has {counted(len(stream), 'token')}, less than one window of {seqlen}; "
                "use more text or shorter windows"
            )
    count = min(int(most / share) + 1 for most, share in zip(available, tokens.shares, strict=True))
    count = min(count, limit) if limit else count
    while any(got > most for got, most in zip(tokens.divide(count), available, strict=True)):
        count -= 1
    counts = _counts(tokens, count)
    windows = [s[: n * seqlen].reshape(n, seqlen) for s, n in zip(tokens.streams, counts, strict=True)]
    return _begun(torch.cat(windows), bos)


def bos_of(model: Any, tokenizer: Any, choice: str = AUTO) -> int | None:
    """Return the BOS token to put in place of every window's first token; None to leave windows as they are.

    The same tokens are predicted either way, because no window's first token is.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer.
    choice : {"auto", "every-window", "as-tokenized"}
        "auto" is "every-window" for Gemma models whose tokenizer has a BOS token, else "as-tokenized".

    Raises
    ------
    UserError
        If every window is to begin with a BOS token, but the tokenizer has none.
    """
    bos = tokenizer.bos_token_id
    if choice == EVERY_WINDOW and bos is None:
        raise UserError(f"--bos {EVERY_WINDOW}: the tokenizer has no BOS token; drop --bos")
    in_every_window = choice == EVERY_WINDOW or (
        choice == AUTO and "gemma" in getattr(model.config, "model_type", "")
    )
    return bos if in_every_window else None


def beginning(tokens: Tokens, tokenizer: Any, bos: int | None) -> str:
    """Say which windows of a text begin with a BOS token, for its protocol."""
    if bos is not None:
        return f"every window begins with {tokenizer.bos_token} in place of its first token"
    token = tokenizer.bos_token_id
    found = [] if token is None else [(s == token).nonzero().flatten().tolist() for s in tokens.streams]
    if not any(found):
        return "no BOS token"
    if found == [[0]]:
        return f"only the text begins with {tokenizer.bos_token}"
    if all(places in ([], [0]) for places in found):
        return f"only texts begin with {tokenizer.bos_token}, windows do not"
    return f"{tokenizer.bos_token} where the text or its chat template has it"


def _counts(tokens: Tokens, windows: int) -> list[int]:
    counts = tokens.divide(windows)
    if not all(counts):
        raise UserError(
            f"too few windows ({windows}) for the shares of the mixture: a part of it would get none; "
            "use more windows, more text, or other shares"
        )
    return counts


def _begun(windows: torch.Tensor, bos: int | None) -> torch.Tensor:
    if bos is None:
        return windows
    windows = windows.clone()
    windows[:, 0] = bos
    return windows
