"""Symmetric ternarization, Section 3.1 (Eq. 1-3); see `reference.twn`."""

from __future__ import annotations

from gpu import checks
from gpu.device import Array
from gpu.kernels.fitting import fit_rows
from gpu.twin import twin


@twin
def symmetric_ternarize(W: Array) -> tuple[Array, Array]:
    grids, T, _, _, _ = fit_rows(checks.matrix(W, "W"), 0, twn=True)
    return grids[:, 0:1], T
