"""Measure perplexity by the protocol of the GPTQ family."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness.calibration.capture import capture_inputs, logits_after
from harness.calibration.passage import Passage, brought
from harness.compute import HOST, Compute, dtype_name
from harness.distributed.ranks import ALONE, Ranks
from harness.models.classes import require_vocabulary
from harness.models.decoder import DecoderLayers, as_text, locate_layers
from harness.models.original import Original, require_fits
from harness.progress import Progress, Say, say_on_stderr
from harness.text import AnyText
from harness.windows import AUTO, beginning, bos_of, evaluation_windows, tokenize
from harness.words import counted

# Rows of logits converted to float32 at a time: so few that those of large vocabularies fit in a CPU cache.
# The divergence then takes a quarter of the time that it takes with 256 rows.
LOGIT_ROWS = 16


@dataclass(frozen=True)
class Perplexity:
    """A perplexity, with everything needed to compare it.

    Attributes
    ----------
    value : float
        exp of the mean negative log-likelihood per token; infinite if that overflows.
    windows, seqlen : int
        Number of windows measured, and tokens per window.
    tokens : int
        Tokens in the whole stream.
    protocol : str
        Text, split, joiner, windows and dtype, in words.
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
    source: str,
    progress: Callable[[], object] = lambda: None,
    ranks: Ranks = ALONE,
) -> Perplexity:
    """Measure the perplexity over windows that do not overlap.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Causal language model.
    windows : (count, seqlen) int64 tensor
        Token ids.
    tokens : int
        Tokens in the stream that the windows were cut from.
    source : str
        Description of the stream, for the protocol.
    progress : callable
        Called after every window.
    ranks : Ranks
        The processes that share the windows; each gets the result.

    Returns
    -------
    Perplexity

    Notes
    -----
    As in GPTQ's code, the mean cross-entropy of the seqlen - 1 predictions in a window is weighted by
    seqlen; the result is exp(sum / (count · seqlen)). The model runs in its own dtype.
    """
    losses = []
    for window in windows[ranks.own(len(windows))]:
        window = window.to(model.device)
        losses.append(mean_loss(model(**as_text(model, window[None]), use_cache=False).logits, window))
        progress()
    return from_losses(of_all(losses, ranks), windows, tokens, source, model.dtype)


@torch.no_grad()
def measure_by_layers(
    model: Any,
    decoder: DecoderLayers,
    windows: torch.Tensor,
    tokens: int,
    source: str,
    compute: Compute,
    progress: Callable[[], object] = lambda: None,
) -> Perplexity:
    """Measure as `measure` does, one decoder layer on the device at a time, for models that do not fit.

    Parameters
    ----------
    model, windows, tokens, source
        As for `measure`; the decoder layers of the model need not be in memory.
    decoder : DecoderLayers
        The decoder layers.
    compute : Compute
        Device that runs them, in the dtype of the model, and the processes that share the windows.
    progress : callable
        Called after every layer.
    """
    passage = run_through(model, decoder, windows, compute, progress)
    own = windows[compute.ranks.own(len(windows))]
    with decoder.outside_on(model, compute.device):
        losses = [
            mean_loss(logits_after(model, passage, window, brought(states, passage.compute)), window)
            for window, states in zip(own, passage.hidden, strict=True)
        ]
    return from_losses(of_all(losses, compute.ranks), windows, tokens, source, model.dtype)


@torch.no_grad()
def run_through(
    model: Any,
    decoder: DecoderLayers,
    windows: torch.Tensor,
    compute: Compute,
    progress: Callable[[], object] = lambda: None,
) -> Passage:
    """Run windows through all decoder layers, one layer on the device at a time; the rest as above.

    Returns
    -------
    Passage
        Its hidden states are the outputs of the last layer for this process's windows, if it has any, in the
        dtype of the model.
    """
    own = compute.ranks.own(len(windows))
    some = windows[own] if own else windows[:1]
    passage = capture_inputs(model, decoder, some, replace(compute.alone(), dtype=None))
    passage.hidden = passage.hidden[: len(own)]
    passage.place()
    for index in range(len(passage.calls)):
        passage.advance(passage.enter(index))
        progress()
    return passage


def measure_on(
    original: Original,
    stream: AnyText,
    seqlen: int,
    windows: int | None,
    compute: Compute,
    what: str = "perplexity",
    say: Say = say_on_stderr,
    bos: str = AUTO,
) -> Perplexity:
    """Measure the perplexity of a model on a text by the text's protocol, with a progress bar.

    The processes of `compute` share the windows. A model that fits on the device is moved there and back.
    Otherwise, or if its decoder layers are on disk, it runs one decoder layer at a time. `bos` is the choice
    of `harness.windows.bos_of`.

    Raises
    ------
    UserError
        If the text is shorter than one window, a window is longer than the model's context, or the model is a
        classifier.
    """
    model = original.model
    require_vocabulary(model, original.name, "has no perplexity")
    arguments = cut_windows(original, stream, seqlen, windows, bos)
    chosen = arguments[0]
    if original.read is not None or not compute.holds(model, seqlen):
        decoder = locate_layers(model, original.read)
        with Progress(what, len(decoder.layers), "layer", say) as step:
            return measure_by_layers(model, decoder, *arguments, compute, step)
    model.to(compute.device)
    try:
        with Progress(what, len(compute.ranks.own(len(chosen))), "window", say) as step:
            return measure(model, *arguments, step, compute.ranks)
    finally:
        model.to(HOST)


def cut_windows(
    original: Original, stream: AnyText, seqlen: int, windows: int | None, bos: str = AUTO
) -> tuple[torch.Tensor, int, str]:
    """Cut a text into the windows that a model is measured on.

    Returns
    -------
    chosen : (count, seqlen) int64 tensor
        Token ids.
    tokens : int
        Tokens in the whole text.
    source : str
        Description of the text and of how windows begin, for the protocol.

    Raises
    ------
    UserError
        If the text is shorter than one window, or a window is longer than the model's context.
    """
    tokens = tokenize(stream, original.tokenizer)
    require_fits(original.model, tokens.all(), seqlen)
    limit = min(filter(None, (windows, stream.windows)), default=None)
    first = bos_of(original.model, original.tokenizer, bos)
    chosen = evaluation_windows(tokens, seqlen, limit, first)
    return chosen, len(tokens), f"{stream.protocol}; {beginning(tokens, original.tokenizer, first)}"


def mean_loss(logits: torch.Tensor, window: torch.Tensor) -> float:
    """Mean cross-entropy of a window's tokens, the first excluded."""
    predicted, targets = logits[0, :-1], window[1:].to(logits.device)
    loss = 0.0
    for rows, goal in zip(predicted.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        loss += torch.nn.functional.cross_entropy(rows.float(), goal, reduction="sum").item()
    return loss / len(targets)


def exponential(mean: float) -> float:
    """Perplexity of a mean negative log-likelihood; infinite if that overflows."""
    return math.inf if mean >= 700 else math.exp(mean)


def of_all(losses: list[float], ranks: Ranks) -> list[float]:
    """The losses of all windows in their order, each process having those of its own."""
    return ranks.gather_numbers(torch.tensor(losses, dtype=torch.float64)).tolist()


def from_losses(
    losses: list[float], windows: torch.Tensor, tokens: int, source: str, dtype: torch.dtype
) -> Perplexity:
    """Turn the mean loss of every window into a perplexity; the arguments are those of `measure`."""
    count, seqlen = windows.shape
    value = exponential(sum(losses) / count)
    protocol = (
        f"{source}; {tokens} tokens, {count} of {counted(tokens // seqlen, 'window')} of {seqlen} "
        f"without overlap, computed in {dtype_name(dtype)}"
    )
    return Perplexity(value, count, seqlen, tokens, protocol)
