"""Windows of tokens: cut from text for calibration and evaluation, and how they begin.

The GPTQ family tokenizes a text as a whole, so that at most its first window begins with a BOS token, and its
published perplexities are measured so. Gemma models break down without one. Who reports their perplexity puts
it at the start of every window: llama.cpp and AutoGPTQ in place of the first token, for all models with a BOS
token; the LM evaluation harness for those with "gemma" in their type. Here, Gemma's windows of calibration
and evaluation begin with it, in place of their first token; other models' are as the GPTQ family has them.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from harness.errors import UserError
from harness.text import Text

# Which windows begin with a BOS token.
AUTO, EVERY_WINDOW, AS_TOKENIZED = BOS_CHOICES = ("auto", "every-window", "as-tokenized")


def tokenize(text: Text, tokenizer: Any) -> torch.Tensor:
    """Tokenize the whole stream, (tokens,), with the special tokens that the tokenizer adds."""
    return tokenizer(text.stream, return_tensors="pt", verbose=False).input_ids[0]


def calibration_windows(
    tokens: torch.Tensor, nsamples: int, seqlen: int, seed: int, bos: int | None = None
) -> torch.Tensor:
    """Draw windows at random starts, (nsamples, seqlen), as the GPTQ family does; `bos` as `bos_of` says.

    Raises
    ------
    UserError
        If there are fewer than seqlen + 1 tokens.
    """
    if len(tokens) < seqlen + 1:
        raise UserError(
            f"the calibration text has {len(tokens)} tokens, but windows of {seqlen} need at least "
            f"{seqlen + 1}; use more text or a smaller --seqlen"
        )
    generator = random.Random(seed)
    starts = [generator.randint(0, len(tokens) - seqlen - 1) for _ in range(nsamples)]
    return _begun(torch.stack([tokens[s : s + seqlen] for s in starts]), bos)


def evaluation_windows(
    tokens: torch.Tensor, seqlen: int, limit: int | None, bos: int | None = None
) -> torch.Tensor:
    """Cut consecutive windows that do not overlap, (windows, seqlen), and drop the remainder.

    `bos`, if given, takes the place of every window's first token, as `bos_of` says.

    Raises
    ------
    UserError
        If there are fewer than seqlen tokens.
    """
    count = len(tokens) // seqlen
    if count == 0:
        raise UserError(
            f"the evaluation text has {len(tokens)} tokens, less than one window of {seqlen}; "
            "use more text or shorter windows"
        )
    count = min(count, limit) if limit else count
    return _begun(tokens[: count * seqlen].reshape(count, seqlen), bos)


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


def beginning(tokens: torch.Tensor, tokenizer: Any, bos: int | None) -> str:
    """Say which windows of a text begin with a BOS token, for its protocol."""
    if bos is not None:
        return f"every window begins with {tokenizer.bos_token} in place of its first token"
    if len(tokens) and tokens[0] == tokenizer.bos_token_id:
        return f"only the text begins with {tokenizer.bos_token}"
    return "no BOS token"


def _begun(windows: torch.Tensor, bos: int | None) -> torch.Tensor:
    if bos is None:
        return windows
    windows = windows.clone()
    windows[:, 0] = bos
    return windows
