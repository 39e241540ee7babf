"""The product with a ternary matrix, straight from packed bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from reference import checks
from reference.checks import Floats
from reference.packing import unpack_base3
from reference.ssr import permute


def matmul(
    x: ArrayLike,
    packed: ArrayLike,
    scale: ArrayLike,
    shift: ArrayLike,
    permutation: ArrayLike,
    block_size: int,
) -> Floats:
    r"""``x @ W_hat.T`` without forming W_hat.

    Parameters
    ----------
    x : (tokens, m) array_like
        Activations, columns in the original order.
    packed : (n, ceil(m / 5)) array_like of uint8
        Trits as `reference.packing.pack_base3` makes them.
    scale, shift : (n, ceil(m / block_size)) array_like
        alpha and mu of every block.
    permutation : (m,) array_like of int
        Original column of every trit.
    block_size : int
        Columns in a block; the last may have fewer.

    Returns
    -------
    y : (tokens, n) float64

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, a byte is not the code of trits, `permutation`
        does not hold every column once, or block_size is not positive.

    Notes
    -----
    With :math:`\hat W_{ij} = \alpha_{ib} T_{ij} + \mu_{ib}` for the block b of column j,

    .. math:: y_i = \sum_b \Big( \alpha_{ib} \sum_{j \in b} T_{ij} x_j + \mu_{ib} \sum_{j \in b} x_j \Big)

    where x is permuted as the columns of T are, and the block sums of x serve every row.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    x = checks.matrix(x, "x")
    columns = x.shape[1]
    T = unpack_base3(packed, columns)
    blocks = -(-columns // block_size)
    scale, shift = checks.matrix(scale, "scale"), checks.matrix(shift, "shift")
    for name, value in (("scale", scale), ("shift", shift)):
        checks.same_shape(name, value, (T.shape[0], blocks))
    x = permute(x, permutation)
    y = np.zeros((x.shape[0], T.shape[0]))
    for b in range(blocks):
        block = slice(b * block_size, (b + 1) * block_size)
        y += scale[:, b] * (x[:, block] @ T[:, block].T) + shift[:, b] * x[:, block].sum(
            axis=1, keepdims=True
        )
    return y
