"""Rounding fed forward: inside a block, the error of each column moves into the columns after it."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import linalg

from reference import checks
from reference.atq import flexible_round
from reference.checks import Floats, Trits


def round_fed_forward(W: ArrayLike, alpha: ArrayLike, mu: ArrayLike, Hinv: ArrayLike) -> Trits:
    r"""Trits of a block for a fixed grid, column by column, as GPTQ rounds to a grid.

    Parameters
    ----------
    W : (n, k) array_like
        Weights of the block.
    alpha, mu : (n, 1) array_like
        Grid.
    Hinv : (k, k) array_like
        The block's part of the inverse of H over the block and the columns that remain.

    Returns
    -------
    T : (n, k) int8

    Raises
    ------
    ValueError
        If shapes do not fit or a value is not finite.
    numpy.linalg.LinAlgError
        If Hinv is not positive definite.

    Notes
    -----
    With :math:`U^T U = H^{-1}_{BB}`, U upper triangular: column j is rounded by Eq. 10, and its error
    :math:`e = (w_j - \hat w_j) / U_{jj}` moves :math:`e U_{jl}` out of every later column l of the block.
    """
    W = checks.matrix(W, "W").copy()
    alpha = checks.column(alpha, W.shape[0], "alpha")
    mu = checks.column(mu, W.shape[0], "mu")
    U: Floats = linalg.cholesky(checks.gram(Hinv, W.shape[1], "Hinv"), lower=False)
    T = np.empty(W.shape, np.int8)
    for j in range(W.shape[1]):
        w = W[:, j : j + 1]
        T[:, j : j + 1] = flexible_round(w, alpha, mu)
        error = (w - (alpha * T[:, j : j + 1] + mu)) / U[j, j]
        W[:, j + 1 :] -= error * U[j, j + 1 :]
    return T
