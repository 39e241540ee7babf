"""Rounding fed forward; see `reference.feedforward`."""

from __future__ import annotations

from gpu import checks
from gpu.device import Array
from gpu.gptq import factored
from gpu.kernels.feedforward import feed_rows
from gpu.twin import twin


@twin
def round_fed_forward(W: Array, alpha: Array, mu: Array, Hinv: Array) -> Array:
    W = checks.matrix(W, "W")
    alpha = checks.column(alpha, W.shape[0], "alpha")
    mu = checks.column(mu, W.shape[0], "mu")
    return feed_rows(W, alpha, mu, factored(checks.gram(Hinv, W.shape[1], "Hinv"), "Hinv"))
