"""Rounds of joint grid and descent with three products by H each, in the dtype of the weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.cpu.descent import descend_rows
from harness.cpu.joint import correct
from reference import checks
from reference.checks import Floats, Trits
from reference.descent import MARGIN, SWEEPS
from reference.joint import spread

__all__ = ["refine", "refined", "settle"]


def refine(
    W: Any,
    T: Any,
    alpha: Any,
    mu: Any,
    H: Any,
    block_size: int,
    rounds: int = 4,
    descent: bool = True,
    symmetric: bool = False,
) -> tuple[Floats, Floats, Trits, list[float]]:
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    W = checks.matrix(W, "W")
    T = checks.trits(T, W.shape)
    H = checks.gram(H, W.shape[1], "H")
    alpha = checks.blocks(alpha, W.shape, block_size, "alpha")
    mu = checks.blocks(mu, W.shape, block_size, "mu")
    return refined(W, W @ H, T, alpha, mu, H, block_size, rounds if descent else 0, symmetric)


def refined(
    W: Any,
    WH: Any,
    T: Trits,
    alpha: Floats,
    mu: Floats,
    H: Any,
    block_size: int,
    rounds: int,
    symmetric: bool,
) -> tuple[Floats, Floats, Trits, list[float]]:
    """Compute `refine` without checks; products are in the dtype of H, and 0 rounds leave the trits alone."""
    T = T.copy()
    errors: list[float] = []
    for _ in range(rounds):
        alpha, mu, before, after = correct(W, WH, T, alpha, mu, H, block_size, symmetric)
        errors += [before, after] if not errors else [after]
        moves, error = settle(W, WH, T, alpha, mu, H, block_size)
        errors.append(error)
        if not moves:
            return alpha, mu, T, errors
    alpha, mu, before, after = correct(W, WH, T, alpha, mu, H, block_size, symmetric)
    return alpha, mu, T, [*(errors or [before]), after]


def settle(
    W: Any, WH: Any, T: Trits, alpha: Floats, mu: Floats, H: Any, block_size: int
) -> tuple[int, float]:
    """Move the trits in place until none lowers the error; return the number of moves, and the error."""
    columns = W.shape[1]
    W_hat = (spread(alpha, columns, block_size) * T + spread(mu, columns, block_size)).astype(H.dtype)
    g = WH - W_hat @ H
    moves = descend_rows(T, g, alpha, H, block_size, SWEEPS, MARGIN)
    residual = W - (spread(alpha, columns, block_size) * T + spread(mu, columns, block_size))
    return moves, float(np.einsum("ij,ij->", residual, g, dtype=np.float64))
