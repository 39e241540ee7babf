"""Whether alpha and mu of a matrix lie in the range of the type that stores them.

float16 rounds values up to 2^-25 (3e-8) to 0, and those of a few of its least steps (6e-8) coarsely. A model
may have such weights and work, as where a norm follows. 8-bit codes hold weights down to 1e-7: a row is lost
only if its factor, the root mean square of its weights, rounds to 0, or beside much larger ones of its block.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from harness.calibration.methods import FitError
from harness.models.decoder import DecoderLayers
from reference.atq import ternary_init
from reference.twn import symmetric_ternarize
from reference.types import CodedGrid, TernaryConfig, TernaryMatrix

# Four of float16's least steps: rounding moves a smaller alpha by more than an eighth.
COARSE = 4 * 2.0**-24

# Only if all weights are below can every alpha of a matrix be rounded to 0.
SMALL = 2.0**-18

ADVICE = "check that the file is right, or scale this matrix in the original, and undo that in what follows"


def require_in_range(decoder: DecoderLayers, config: TernaryConfig) -> None:
    """Refuse a matrix that could not be stored, before any is fitted; those on disk are not read for it.

    Raises
    ------
    FitError
        If alpha and mu of all blocks of a matrix round to 0, or some overflow; the message names the matrix.
    """
    for name, linear in decoder.named_linears().items():
        weight = linear.weight.detach()
        if weight.is_meta:
            continue
        largest = max(float(extreme.abs()) for extreme in weight.aminmax())
        if 0 < largest < SMALL and _vanishes(weight.double().numpy(), config):
            raise vanished(name, largest)
        limit = torch.finfo(torch.float16).max
        if limit < largest < math.inf and (weight.double().square().mean(1).sqrt() > limit).any():
            raise FitError(
                f"{name}: its weights, up to {largest:.3g}, are too large for alpha and mu in float16; "
                f"{ADVICE}"
            )


def vanished(name: str, largest: float) -> FitError:
    """Return the error of a matrix of which nothing is left."""
    return FitError(
        f"{name}: its weights, up to {largest:.3g}, are so small that alpha and mu all round to 0; {ADVICE}"
    )


def _vanishes(W: np.ndarray, config: TernaryConfig) -> bool:
    """Whether all that is stored rounds to 0, judged by the start of the fit in the order of the columns."""
    if config.grid == "int8":
        return not np.sqrt(np.square(W).mean(axis=1)).astype(np.float16).any()
    start = symmetric_ternarize if config.symmetric else ternary_init
    starts = (start(W[:, i : i + config.block_size]) for i in range(0, W.shape[1], config.block_size))
    return not any(part.astype(np.float16).any() for *grid, _ in starts for part in grid)


def lost_share(name: str, weight: torch.Tensor, gram: torch.Tensor, matrix: TernaryMatrix) -> float:
    """Return the share of blocks of rows whose weights are lost because alpha (or mu) is too small.

    A block is lost if its weights differ but its alpha is 0, or in float16 less than `COARSE`; or if its
    weights are all the same but alpha and mu are 0. Without a shift it is lost if any weight is not 0 but
    alpha is too small. Weights of dead inputs count as 0.

    Raises
    ------
    FitError
        If alpha and mu of all blocks are 0, but some weight is not.
    """
    live = weight.masked_fill(gram.diagonal() == 0, 0)
    ordered = live[:, torch.from_dlpack(matrix.permutation)]
    filled = -ordered.shape[1] % matrix.block_size
    # Repeat the last column, which changes neither extreme.
    ordered = torch.cat([ordered, ordered[:, -1:].expand(-1, filled)], dim=1)
    low, high = ordered.unflatten(1, (-1, matrix.block_size)).aminmax(dim=2)
    alpha = grid_values(matrix.scale).abs()
    mu = torch.zeros_like(alpha) if matrix.shift is None else grid_values(matrix.shift).abs()
    if not alpha.any() and not mu.any() and live.any():
        raise vanished(name, float(live.abs().max()))
    least = 0.0 if isinstance(matrix.scale, CodedGrid) else COARSE
    small = (alpha == 0) | (alpha < least)
    if matrix.shift is None:
        return float((small & ((low != 0) | (high != 0))).double().mean())
    constant = low == high
    lost = torch.where(constant, (low != 0) & (alpha == 0) & (mu == 0), small)
    return float(lost.double().mean())


def grid_values(grid: Any) -> torch.Tensor:
    """Return alpha or mu of every block, (n, blocks) float32, as they are stored."""
    values = grid.decode() if isinstance(grid, CodedGrid) else grid.astype(np.float32)
    return torch.from_dlpack(values)
