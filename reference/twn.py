"""Symmetric ternarization, Section 3.1 (Eq. 1-3): Ternary Weight Networks (Li et al., 2016)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from reference import checks
from reference.checks import Floats, Trits

# Eq. 3: the threshold as a share of the mean magnitude.
THRESHOLD = 0.75


def symmetric_ternarize(W: ArrayLike) -> tuple[Floats, Trits]:
    r"""Approximate each row of W by ``alpha * T`` (Eq. 1-3).

    Parameters
    ----------
    W : (n, m) array_like
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

    Notes
    -----
    The threshold that approximates the minimum of Eq. 1, :math:`\|W - \alpha T\|_F^2`, is
    (Eq. 3) :math:`\Delta_i = \frac{0.75}{m} \sum_j |W_{ij}|`; T is the sign of each weight beyond
    it (Eq. 2), and alpha the mean magnitude of those weights,
    :math:`\alpha_i = \sum_j T_{ij} W_{ij} / \sum_j |T_{ij}|`.

    Examples
    --------
    >>> alpha, T = symmetric_ternarize([[1.0, -1.0, 0.25, 0.0]])
    >>> alpha.item(), T.tolist()
    (1.0, [[1, -1, 0, 0]])
    """
    W = checks.matrix(W, "W")
    delta = THRESHOLD * np.abs(W).mean(axis=1, keepdims=True)
    T = ((W > delta).astype(np.int8) - (W < -delta)).astype(np.int8)
    kept = np.abs(T).sum(axis=1, keepdims=True)
    # No weight is beyond the threshold only where all are zero (or subnormal); then alpha is 0 as well.
    alpha = (T * W).sum(axis=1, keepdims=True) / np.maximum(kept, 1)
    return alpha, T
