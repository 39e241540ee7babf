"""The refinement of whole rows after the last block, from its definitions.

`reference` keeps gradients up to date and sums over blocks. Here the joint grid writes out the P of every row
and solves with P H Pᵀ, and the descent tries all three trits by the error of the whole row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from golden.arithmetic import Array, Dense, Exact

Kit = Exact | Dense

# As `reference.joint.RIDGE` and `reference.descent.MARGIN`, repeated here.
RIDGE = 1e-3
MARGIN = 1e-7
SWEEPS = 8


def damped_objective(kit: Kit, C: Array, damping: float) -> Array:
    """C with a share of the mean of its diagonal added to every diagonal entry that is not 0."""
    H = C.copy()
    mean = np.diag(C).sum() / len(C)
    for j in np.flatnonzero(np.diag(C) != 0):
        H[j, j] = H[j, j] + kit.numbers(damping)[()] * mean
    return H


def spread(grid: Array, columns: int, block_size: int) -> Array:
    """Give column j the value of block j // block_size."""
    return np.stack([grid[:, j // block_size] for j in range(columns)], axis=1)


def dequantized(T: Array, alpha: Array, mu: Array, block_size: int) -> Array:
    """Compute the weights of trits and grid."""
    columns = T.shape[1]
    return spread(alpha, columns, block_size) * T + spread(mu, columns, block_size)


def align_jointly(
    kit: Kit,
    W: Array,
    T: Array,
    alpha: Array,
    mu: Array,
    H: Array,
    block_size: int,
    symmetric: bool = False,
) -> tuple[Array, Array]:
    """Correct the grid of every row by solving with its P H Pᵀ and the ridge, over directions that weigh."""
    residual = W - dequantized(T, alpha, mu, block_size)
    alpha, mu = alpha.copy(), mu.copy()
    columns, blocks = T.shape[1], alpha.shape[1]
    inside = [[j // block_size == b for j in range(columns)] for b in range(blocks)]
    for i, t in enumerate(T):
        P = kit.numbers(np.vstack([np.where(inside, t, 0), np.where(inside, 1, 0)]).astype(float))
        A = P @ H @ P.T
        weighs = np.flatnonzero(np.diag(A) > 0)
        if symmetric:
            weighs = weighs[weighs < blocks]
        if not weighs.size:
            continue
        A = A[np.ix_(weighs, weighs)]
        ridge = kit.numbers(np.eye(len(A))) * np.diag(A) * kit.numbers(RIDGE)
        correction = kit.solve(A + ridge, (P[weighs] @ H @ residual[i])[:, None])[:, 0]
        for direction, step in zip(weighs, correction, strict=True):
            grid = alpha if direction < blocks else mu
            grid[i, direction % blocks] += step
    return alpha, mu


def descend(
    kit: Kit,
    W: Array,
    T: Array,
    alpha: Array,
    mu: Array,
    H: Array,
    block_size: int,
    sweeps: int = SWEEPS,
) -> Array:
    """Give every trit in turn the best of three values, if the whole row gains more than the margin by it."""
    T = T.copy()
    residual = W - dequantized(T, alpha, mu, block_size)
    for _ in range(sweeps):
        before = T.copy()
        for j in range(T.shape[1]):
            step = alpha[:, j // block_size]
            errors = []
            for t in (-1, 0, 1):
                tried = residual.copy()
                tried[:, j] = residual[:, j] - step * (t - T[:, j])
                errors.append(kit.row_errors(tried, H))
            for i, unit in enumerate(step * step * H[j, j]):
                if not unit:
                    continue
                of = [error[i] for error in errors]
                # Of a parabola in t: its lowest point, in units of trits.
                kit.note(abs(abs((of[0] - of[2]) / (4 * unit)) - 1 / 2))
                old = T[i, j]
                best = min((old, 0, 1, -1), key=lambda t: of[t + 1])
                gain = (of[old + 1] - of[best + 1]) / unit
                if best != old:
                    kit.note(abs(gain - kit.numbers(MARGIN)[()]))
                if gain > kit.numbers(MARGIN)[()]:
                    residual[i, j] -= step[i] * (best - old)
                    T[i, j] = best
        if (T == before).all():
            break
    return T


def refine(
    kit: Kit,
    W: Array,
    T: Array,
    alpha: Array,
    mu: Array,
    H: Array,
    block_size: int,
    rounds: int = 4,
    descent: bool = True,
    symmetric: bool = False,
) -> tuple[Array, Array, Array, list[Any]]:
    """Alternate joint grid and descent until no trit changes; end with a joint grid if the rounds run out."""

    def error() -> Any:
        return kit.output_error(W - dequantized(T, alpha, mu, block_size), H)

    errors = [error()]
    settled = False
    for _ in range(rounds if descent else 0):
        alpha, mu = align_jointly(kit, W, T, alpha, mu, H, block_size, symmetric)
        errors.append(error())
        moved = descend(kit, W, T, alpha, mu, H, block_size)
        settled, T = bool((moved == T).all()), moved
        errors.append(error())
        if settled:
            break
    if not settled:
        alpha, mu = align_jointly(kit, W, T, alpha, mu, H, block_size, symmetric)
        errors.append(error())
    return alpha, mu, T, errors
