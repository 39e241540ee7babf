"""Symmetric ternarization, Section 3.1 (Eq. 1-3); see `reference.twn`."""

from __future__ import annotations

from gpu import checks
from gpu.device import Array
from gpu.kernels.fitting import fit_rows


def symmetric_ternarize(W: Array) -> tuple[Array, Array]:
    """Approximate each row of W by ``alpha * T`` (Eq. 1-3).

    Parameters
    ----------
    W : (n, m) float32 or float64
        Weights.

    Returns
    -------
    alpha : (n, 1) float64
        Scale; 0 for a row in which no weight exceeds the threshold.
    T : (n, m) int8
        Trits.

    Raises
    ------
    ValueError
        If W is not a non-empty, finite matrix.
    """
    grids, T, _, _, _ = fit_rows(checks.matrix(W, "W"), 0, symmetric=True)
    return grids[:, 0:1], T
