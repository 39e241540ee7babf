"""Compare a quantized model with its original, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness.calibration.capture import logits_after
from harness.calibration.passage import brought
from harness.compute import HOST, Compute
from harness.distributed.ranks import ALONE, Ranks
from harness.errors import UserError
from harness.models.classes import is_classifier
from harness.models.decoder import as_text, locate_layers
from harness.models.original import Original, require_fits
from harness.perplexity import (
    LOGIT_ROWS,
    Perplexity,
    cut_windows,
    from_losses,
    mean_loss,
    of_all,
    run_through,
)
from harness.progress import Progress, Say, say_on_stderr
from harness.text import AnyText
from harness.windows import AUTO


@dataclass(frozen=True)
class Divergence:
    """How far the predictions of a model are from those of its original.

    Attributes
    ----------
    mean : float
        Mean over predictions of KL(original ‖ quantized) in nats.
    percentile_99 : float
        Its 99th percentile.
    agreement : float
        Share of predictions for which both models find the same token, or label, most likely.
    tokens : int
        Number of predictions: of a token after each but the last of a window; of a classifier, of a label for
        each token or each window.
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
        Models with the same vocabulary, or classifiers with the same labels, on one device.
    windows : (count, seqlen) int64 tensor
        Token ids.
    progress : callable
        Called after every window.
    ranks : Ranks
        The processes that share the windows; each gets the result.

    Returns
    -------
    losses : list of float
        Mean cross-entropy of the quantized model in each window; empty for a classifier.
    found : Divergence
        The divergence.

    Notes
    -----
    Each model runs once per window, in its own dtype. Logits are compared in float32, `LOGIT_ROWS` tokens at
    a time, and never kept.
    """
    losses, total = [], _Total()
    labels = is_classifier(original)
    for window in windows[ranks.own(len(windows))]:
        text = as_text(original, window[None].to(original.device))
        expected, got = (model(**text, use_cache=False).logits for model in (original, quantized))
        if labels:
            total.add(*(logits.flatten(0, -2) for logits in (expected, got)))
        else:
            losses.append(mean_loss(got, window))
            total.add(expected[0, :-1], got[0, :-1])
        progress()
    return of_all(losses, ranks), total.result(ranks)


class _Total:
    """Adds up divergences of predictions."""

    def __init__(self) -> None:
        self.divergences = [torch.zeros(0)]
        self.agreed = 0

    def add(self, expected: torch.Tensor, got: torch.Tensor) -> None:
        """Add predictions, given the (count, choices) logits of both models."""
        for p, q in zip(expected.split(LOGIT_ROWS), got.split(LOGIT_ROWS), strict=True):
            log_p, log_q = (logits.float().log_softmax(-1) for logits in (p, q))
            self.divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).cpu())
            self.agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())

    def result(self, ranks: Ranks) -> Divergence:
        """The divergence over the predictions of all processes."""
        every = ranks.gather_numbers(torch.cat(self.divergences)).double()
        mean, percentile = float(every.mean()), float(every.quantile(0.99))
        return Divergence(mean, percentile, ranks.total([self.agreed])[0] / len(every), len(every))


@dataclass(frozen=True)
class Reference:
    """What is kept of an original that is gone once its quantized model is there, to measure the divergence.

    Norm and head turn hidden states into the original's logits, whichever of the two models they belong to.

    Attributes
    ----------
    windows : (count, seqlen) int64 tensor
        Token ids.
    states : list of (1, seqlen, width) tensors
        Output of the original's last decoder layer for this process's windows, in its dtype, on the host.
    """

    windows: torch.Tensor
    states: list[torch.Tensor]

    @classmethod
    def of(cls, original: Original, windows: torch.Tensor, compute: Compute, say: Say) -> Reference:
        """Run the original, one decoder layer on the device at a time."""
        decoder = locate_layers(original.model, original.read)
        with Progress("outputs of the original", len(decoder.layers), "layer", say) as step:
            passage = run_through(original.model, decoder, windows, compute, step)
        return cls(windows, [states.to(HOST) for states in passage.hidden])

    @torch.no_grad()
    def divergence_of(self, quantized: Original, compute: Compute, say: Say) -> Divergence:
        """Measure the divergence of a model that has the original's norm and head."""
        model, total = quantized.model, _Total()
        decoder = locate_layers(model, quantized.read)
        with Progress("divergence from the original", len(decoder.layers), "layer", say) as step:
            passage = run_through(model, decoder, self.windows, compute, step)
        own = self.windows[compute.ranks.own(len(self.windows))]
        with decoder.outside_on(model, compute.device):
            for window, *both in zip(own, self.states, passage.hidden, strict=True):
                states = (brought(s, passage.compute) for s in both)
                total.add(*(logits_after(model, passage, window, s)[0, :-1] for s in states))
        return total.result(compute.ranks)


def divergence_on(
    original: Original,
    quantized: Original,
    stream: AnyText,
    seqlen: int,
    windows: int | None,
    compute: Compute,
    say: Say = say_on_stderr,
    bos: str = AUTO,
) -> tuple[Perplexity | None, Divergence]:
    """Measure the perplexity of a quantized model on a text, and its divergence, in one pass of each model.

    A classifier has no perplexity.

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
    perplexity = from_losses(losses, chosen, tokens, source, quantized.model.dtype) if losses else None
    return perplexity, found


def require_comparable(original: Original, quantized: Original) -> None:
    """Refuse models that cannot be compared.

    Raises
    ------
    UserError
        If one is read from disk layer by layer, their vocabularies have different sizes, only one is a
        classifier, or their labels differ in number or do not exclude each other.
    """
    for model in (original, quantized):
        if model.read is not None:
            raise UserError(
                f"{model.name} is too large for the memory of this machine; it cannot be compared"
            )
    for what, sizes in (
        ("tokens", [model.model.config.get_text_config().vocab_size for model in (original, quantized)]),
        ("labels", [_labels(model) for model in (original, quantized)]),
    ):
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{quantized.name} has {sizes[1]} {what}, {original.name} has {sizes[0]}: it is not its "
                "original"
            )


def _labels(original: Original) -> int:
    """Number of labels of a classifier; 0 for a language model."""
    model = original.model
    if not is_classifier(model):
        return 0
    kind = getattr(model.config, "problem_type", None)
    if model.config.num_labels == 1 or kind in ("regression", "multi_label_classification"):
        raise UserError(
            f"the outputs of {original.name} are no probabilities of labels that exclude each other; "
            "divergence is not measured for them"
        )
    return int(model.config.num_labels)
