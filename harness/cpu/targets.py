"""The shift towards targets by one factorization and two triangular solves; see `reference.targets`."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import linalg

from harness.cpu.gptq import factor_damped
from reference import checks
from reference.checks import Floats

__all__ = ["shift_targets"]


def shift_targets(W: Any, C: Any, D: Any, damping: float = 0.1, strength: float = 1.0) -> Floats:
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, got {strength}")
    W, D = checks.matrix(W, "W"), checks.matrix(D, "D")
    checks.same_shape("D", D, W.shape)
    C = checks.gram(C, W.shape[1])
    L, _ = factor_damped(C, damping)
    alive = np.where(np.diag(C) == 0, 0.0, D)
    return W + strength * linalg.cho_solve((L, True), alive.T, check_finite=False).T
