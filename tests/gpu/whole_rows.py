"""Matrices for the tests of what works on whole rows: joint grid and descent."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from reference.descent import descend
from reference.joint import damped_objective, spread
from tests.reference.strategies import random_gram


class Rows(NamedTuple):
    """Arguments of `reference.descent.descend`, by its names."""

    W: Any
    T: Any
    alpha: Any
    mu: Any
    H: Any
    block_size: int

    @property
    def residual(self) -> Any:
        """W - W_hat."""
        columns = self.W.shape[1]
        alpha, mu = (spread(grid, columns, self.block_size) for grid in (self.alpha, self.mu))
        return self.W - (alpha * self.T + mu)

    @property
    def gradients(self) -> Any:
        """(W - W_hat) H."""
        return self.residual @ self.H


def random_rows(rows, columns, block_size, kind="white", spoiled=None, dtype="float64"):
    """Weights, any trits, and a grid that fits them badly.

    With `spoiled`, trits that no move improves, but for so many in every row: a simulator takes its time.
    """
    rng = np.random.default_rng([rows, columns, block_size])
    W = (rng.normal(size=(rows, columns)) + rng.normal(size=(rows, 1))).astype(dtype)
    T = rng.integers(-1, 2, size=W.shape).astype(np.int8)
    alpha, mu = rng.normal(size=(2, rows, -(-columns // block_size)))
    H = damped_objective(random_gram(rng, columns, kind), 0.1)
    case = Rows(W, T, alpha, mu + W.mean(axis=1, keepdims=True), H, block_size)
    if spoiled is None:
        return case
    T = descend(*case, sweeps=100)
    for row in range(rows):
        T[row, rng.choice(columns, min(spoiled, columns), replace=False)] = rng.integers(-1, 2)
    return case._replace(T=T)
