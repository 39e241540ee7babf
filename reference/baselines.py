"""What people compare with: rounding to nearest, and GPTQ (Frantar et al., 2023) at a few bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import linalg

from reference import checks
from reference.checks import Floats
from reference.gptq import invert_damped

# The search of GPTQ's code for a clipped grid: shrink the range in steps of a hundredth, the last of which
# is above a fifth, and keep for every row what has the least sum of |error|^2.4.
CLIP_STEPS = 100
SMALLEST_RANGE = 0.2
CLIP_NORM = 2.4


def round_to_nearest(W: ArrayLike, bits: int = 2, group_size: int = 128) -> Floats:
    """Round every weight to a min-max grid of its row and group of columns.

    Parameters
    ----------
    W : (n, m) array_like
        Weights.
    bits : int
        Bits of a weight; the grid has 2**bits values.
    group_size : int
        Columns that share a grid.

    Returns
    -------
    W_hat : (n, m) float64

    Raises
    ------
    ValueError
        If W is not a non-empty, finite matrix, or bits or group_size is not positive.
    """
    _check_grid(bits, group_size)
    W = checks.matrix(W, "W")
    W_hat = np.empty_like(W)
    for first in range(0, W.shape[1], group_size):
        group = slice(first, first + group_size)
        W_hat[:, group] = _round(W[:, group], *_min_max_grid(W[:, group], bits), bits)
    return W_hat


def gptq(
    W: ArrayLike,
    C: ArrayLike,
    bits: int = 2,
    group_size: int = 128,
    damping: float = 0.01,
    activation_order: bool = False,
    clip: bool = False,
) -> Floats:
    """GPTQ, column by column.

    Parameters
    ----------
    W : (n, m) array_like
        Weights.
    C : (m, m) array_like
        Gram matrix of the inputs.
    bits, group_size
        As for `round_to_nearest`.
    damping : float
        As for `reference.gptq.invert_damped`.
    activation_order : bool
        Quantize columns by falling diagonal of C; groups follow that order.
    clip : bool
        Search each grid for the range of least error instead of min-max.

    Returns
    -------
    W_hat : (n, m) float64
        Columns in their original order.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, C is not a Gram matrix, or bits or group_size is
        not positive.
    numpy.linalg.LinAlgError
        If the damped Gram matrix has no inverse.

    Notes
    -----
    With U the upper Cholesky factor of H⁻¹, quantizing column j with the error e moves
    e / U_jj · U_jR into the columns R after it. Its paper has neither activation order nor clipping.
    """
    _check_grid(bits, group_size)
    W = checks.matrix(W, "W")
    C = checks.gram(C, W.shape[1])
    W = np.where(np.diag(C) == 0, 0.0, W)
    order = np.argsort(-np.diag(C), kind="stable") if activation_order else np.arange(W.shape[1])
    W = W[:, order]
    Hinv, _ = invert_damped(C[np.ix_(order, order)], damping)
    U = linalg.cholesky(Hinv, lower=False)
    W_hat = np.empty_like(W)
    for first in range(0, W.shape[1], group_size):
        last = min(first + group_size, W.shape[1])
        grid = (_clipped_grid if clip else _min_max_grid)(W[:, first:last], bits)
        errors = np.empty((W.shape[0], last - first))
        for j in range(first, last):
            W_hat[:, j : j + 1] = _round(W[:, j : j + 1], *grid, bits)
            errors[:, j - first] = (W[:, j] - W_hat[:, j]) / U[j, j]
            W[:, j + 1 : last] -= np.outer(errors[:, j - first], U[j, j + 1 : last])
        W[:, last:] -= errors @ U[first:last, last:]
    result = np.empty_like(W_hat)
    result[:, order] = W_hat
    return result


def _check_grid(bits: int, group_size: int) -> None:
    for name, value in (("bits", bits), ("group_size", group_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _round(W: Floats, step: Floats, zero: Floats, bits: int) -> Floats:
    return step * (np.clip(np.round(W / step) + zero, 0, 2**bits - 1) - zero)


def _min_max_grid(W: Floats, bits: int, shrink: float = 1.0) -> tuple[Floats, Floats]:
    """Step and integer zero of each row's grid from its least to its largest weight, 0 included."""
    low = shrink * np.minimum(W.min(axis=1, keepdims=True), 0)
    high = shrink * np.maximum(W.max(axis=1, keepdims=True), 0)
    step = (high - low) / (2**bits - 1)
    step = np.where(step == 0, 1.0, step)  # a row of zeros rounds to zeros on any grid
    return step, np.round(-low / step)


def _clipped_grid(W: Floats, bits: int) -> tuple[Floats, Floats]:
    step, zero = _min_max_grid(W, bits)
    least = np.full(W.shape[0], np.inf)
    for i in range(int((1 - SMALLEST_RANGE) * CLIP_STEPS)):
        candidate = _min_max_grid(W, bits, 1 - i / CLIP_STEPS)
        error = (np.abs(_round(W, *candidate, bits) - W) ** CLIP_NORM).sum(axis=1)
        better = error < least
        least[better] = error[better]
        step[better], zero[better] = candidate[0][better], candidate[1][better]
    return step, zero
