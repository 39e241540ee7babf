"""Count the trits of a matrix, and alpha and mu of its blocks, in bins that add up over matrices.

Bins do not depend on the matrix. Those of alpha are powers: bin b holds 2^(b/4) <= |alpha| < 2^((b+1)/4).
Those of mu are shares of alpha: bin b holds b/8 <= mu/|alpha| < (b+1)/8, and bins -32 and 31 all beyond.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from harness.calibration.fits import FittedMatrix
from harness.calibration.grid_range import grid_values
from harness.page.kinds import kind_of
from reference.types import TernaryMatrix

# Bins of mu from -4 to 4 times alpha.
LAST_SHIFT = 31


def count_trits(matrix: TernaryMatrix) -> list[int]:
    """Return the numbers of trits -1, 0 and +1."""
    trits = torch.from_dlpack(matrix.trits)
    return [int((trits == t).sum()) for t in (-1, 0, 1)]


def grid_histograms(matrices: Iterable[FittedMatrix]) -> dict[str, dict[str, Any]]:
    """Count alpha and mu of all blocks of a layer, by the kind of the matrix.

    Returns
    -------
    dict
        For each kind, ``alpha`` and ``mu``: ``{"first": bin, "counts": [...]}``, without empty bins at the
        ends; and ``constant``, the number of blocks whose alpha is 0, which are in neither. There is no
        ``mu`` if it is not stored. Empty for a baseline.
    """
    found: dict[str, list[TernaryMatrix]] = {}
    for matrix in matrices:
        if isinstance(matrix.result, TernaryMatrix):
            found.setdefault(kind_of(matrix.name), []).append(matrix.result)
    return {kind: _histograms(results) for kind, results in found.items()}


def _histograms(matrices: list[TernaryMatrix]) -> dict[str, Any]:
    alpha = torch.cat([grid_values(m.scale).flatten() for m in matrices]).abs().cpu().numpy().astype(float)
    kept = alpha > 0
    counted: dict[str, Any] = {
        "alpha": _counts(np.floor(4 * np.log2(alpha[kept]))),
        "constant": int((~kept).sum()),
    }
    if matrices[0].shift is not None:
        mu = torch.cat([grid_values(m.shift).flatten() for m in matrices]).cpu().numpy().astype(float)
        shares = np.floor(8 * (mu[kept] / alpha[kept]))
        counted["mu"] = _counts(shares.clip(-LAST_SHIFT - 1, LAST_SHIFT))
    return counted


def _counts(bins: np.ndarray) -> dict[str, Any]:
    if not bins.size:
        return {"first": 0, "counts": []}
    first = int(bins.min())
    return {"first": first, "counts": np.bincount(bins.astype(int) - first).tolist()}
