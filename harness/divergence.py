"""Compare a quantized model with its original, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness.compute import HOST, Compute
from harness.distributed.ranks import ALONE, Ranks
from harness.errors import UserError
from harness.models.original import Original, require_fits
from harness.perplexity import LOGIT_ROWS, Perplexity, cut_windows, from_losses, mean_loss
from harness.progress import Progress, Say, say_on_stderr
from harness.text import AnyText
from harness.windows import AUTO


@dataclass(frozen=True)
class Divergence:
    """How far the predictions of a model are from those of its original.

    Attributes
    ----------
    mean : float
        Mean over tokens of KL(original ‖ quantized) in nats.
    percentile_99 : float
        Its 99th percentile.
    agreement : float
        Share of tokens for which both models find the same next token most likely.
    tokens : int
        Number of predictions.
    """

    mean: float
    percentile_99: float
    agreement: float
    tokens: int


@torch.no_grad()
def divergence(
    original: Any,
    quantized: Any,
    windows: torch.Tensor,
    progress: Callable[[], object] = lambda: None,
    ranks: Ranks = ALONE,
) -> tuple[list[float], Divergence]:
    """Measure the divergence over all predictions inside the windows.

    Parameters
    ----------
    original, quantized : transformers.PreTrainedModel
        Models with the same vocabulary, on one device.
    windows : (count, seqlen) int64 tensor
        Token ids.
    progress : callable
        Called after every window.
    ranks : Ranks
        The processes that share the windows; each gets the result.

    Returns
    -------
    losses : list of float
        Mean cross-entropy of the quantized model in each window.
    found : Divergence
        The divergence.

    Notes
    -----
    Each model runs once per window, in its own dtype. Logits are compared in float32, `LOGIT_ROWS` tokens at
    a time, and never kept.
    """
    losses, divergences, agreed = [], [torch.zeros(0)], 0
    for window in windows[ranks.own(len(windows))]:
        ids = window[None].to(original.device)
        expected, got = (model(ids, use_cache=False).logits for model in (original, quantized))
        losses.append(mean_loss(got, window))
        for p, q in zip(expected[0, :-1].split(LOGIT_ROWS), got[0, :-1].split(LOGIT_ROWS), strict=True):
            log_p, log_q = (logits.float().log_softmax(-1) for logits in (p, q))
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).cpu())
            agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        progress()
    losses = ranks.gather_numbers(torch.tensor(losses, dtype=torch.float64)).tolist()
    every = ranks.gather_numbers(torch.cat(divergences)).double()
    share = ranks.total([agreed])[0] / len(every)
    return losses, Divergence(float(every.mean()), float(every.quantile(0.99)), share, len(every))


def divergence_on(
    original: Original,
    quantized: Original,
    stream: AnyText,
    seqlen: int,
    windows: int | None,
    compute: Compute,
    say: Say = say_on_stderr,
    bos: str = AUTO,
) -> tuple[Perplexity, Divergence]:
    """Measure the perplexity of a quantized model on a text, and its divergence, in one pass of each model.

    The windows are those of `harness.perplexity.measure_on`; the processes of `compute` share them. Both
    models are moved to the device if it holds them, and back.

    Raises
    ------
    UserError
        If `require_comparable` refuses the models, or a window is longer than a model's context.
    """
    require_comparable(original, quantized)
    models = (original.model, quantized.model)
    ranks = compute.ranks
    chosen, tokens, source = cut_windows(original, stream, seqlen, windows, bos)
    require_fits(quantized.model, chosen, seqlen)
    fits = compute.memory is None or all(
        replace(compute, memory=compute.memory // 2).holds(m, seqlen) for m in models
    )
    for model in models:
        model.to(compute.device if fits else HOST)
    try:
        with Progress("divergence from the original", len(ranks.own(len(chosen))), "window", say) as step:
            losses, found = divergence(*models, chosen, step, ranks)
    finally:
        for model in models:
            model.to(HOST)
    return from_losses(losses, chosen, tokens, source, quantized.model.dtype), found


def require_comparable(original: Original, quantized: Original) -> None:
    """Refuse models that cannot be compared.

    Raises
    ------
    UserError
        If one is read from disk layer by layer, or their vocabularies have different sizes.
    """
    for model in (original, quantized):
        if model.read is not None:
            raise UserError(
                f"{model.name} is too large for the memory of this machine; it cannot be compared"
            )
    sizes = [model.model.config.get_text_config().vocab_size for model in (original, quantized)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{quantized.name} has {sizes[1]} tokens, {original.name} has {sizes[0]}: it is not its original"
        )
