"""Perplexity as the GPTQ family measures it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Rows of logits turned into float32 at a time; a vocabulary is wide.
LOGIT_ROWS = 256


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and everything it depends on.

    Attributes
    ----------
    value : float
        exp of the mean negative log-likelihood a token; infinite if that overflows.
    windows, seqlen : int
        Windows measured, and tokens in each.
    tokens : int
        Tokens of the whole stream.
    protocol : str
        Text, split and joining, windows and dtype in words.
    """

    value: float
    windows: int
    seqlen: int
    tokens: int
    protocol: str


@torch.no_grad()
def measure(
    model: Any,
    windows: torch.Tensor,
    tokens: int,
    text: str,
    progress: Callable[[], None] = lambda: None,
) -> Perplexity:
    """Perplexity over windows that do not overlap.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Causal language model.
    windows : (count, seqlen) int64 tensor
        Token ids.
    tokens : int
        Tokens of the stream that the windows were cut from.
    text : str
        What the stream is, for the protocol.
    progress : callable
        Called after every window.

    Returns
    -------
    Perplexity

    Notes
    -----
    The mean cross-entropy over the seqlen - 1 predictions inside a window counts seqlen times, so that
    the result is exp(sum / (count · seqlen)), as in GPTQ's code. The model runs in its own dtype.
    """
    count, seqlen = windows.shape
    total = 0.0
    for window in windows:
        logits = model(window[None].to(model.device), use_cache=False).logits[0, :-1]
        targets = window[1:].to(logits.device)
        loss = 0.0
        for rows, goal in zip(logits.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            loss += torch.nn.functional.cross_entropy(rows.float(), goal, reduction="sum").item()
        total += loss / (seqlen - 1) * seqlen
        progress()
    mean = total / (count * seqlen)
    value = math.exp(mean) if mean < 700 else math.inf  # NaN stays NaN
    protocol = (
        f"{text}; {tokens} tokens, {count} of {tokens // seqlen} windows of {seqlen} without overlap, "
        f"computed in {str(model.dtype).removeprefix('torch.')}"
    )
    return Perplexity(math.nan if math.isnan(mean) else value, count, seqlen, tokens, protocol)
