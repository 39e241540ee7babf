"""A second `ternarize` by another route, to compare the first with.

No running inverse: before every block the remaining columns are computed afresh from the original
weights, W_R + (W_Q - Ŵ_Q) H_QR H_RR⁻¹ with Q all columns quantized so far. Grids come from dense least
squares, trits from the least of three squared distances, blocks from a loop over Eq. 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from tests.reference.strategies import quadratic_error, square_root


@dataclass
class Block:
    """One block after each stage; `cost` is what it costs once its error has been compensated."""

    columns: list[int]
    W: np.ndarray
    C: np.ndarray
    cost: np.ndarray
    alpha: np.ndarray = field(init=False)
    mu: np.ndarray = field(init=False)
    T: np.ndarray = field(init=False)
    weight_errors: list[float] = field(default_factory=list)
    output_errors: dict[str, float] = field(default_factory=dict)

    def W_hat(self):
        return self.alpha[:, None] * self.T + self.mu[:, None]

    def weight_error(self):
        return float(np.square(self.W - self.W_hat()).sum())

    def output_error(self):
        return quadratic_error(self.W, self.W_hat(), self.C)


def damped(C, damping):
    """H, with 1 for the inputs that are dead, which are coupled to nothing."""
    H = C + damping * np.trace(C) / len(C) * np.eye(len(C))
    for j in range(len(C)):
        if C[j, j] == 0:
            H[j, j] = 1
    return H


def remaining(W, W_hat, H, done, rest):
    """Original weights of `rest`, compensated for everything that was done to the columns `done`."""
    if not done:
        return W[:, rest]
    E = (W - W_hat)[:, done]
    return W[:, rest] + np.linalg.solve(H[np.ix_(rest, rest)], (E @ H[np.ix_(done, rest)]).T).T


def conditional_cost(H, block, later):
    """What is left of H_BB when the later columns are free to make up for the block."""
    if not later:
        return H[np.ix_(block, block)]
    coupling = H[np.ix_(later, block)]
    return H[np.ix_(block, block)] - coupling.T @ np.linalg.solve(H[np.ix_(later, later)], coupling)


def ternarize_densely(W, C, config, random_order=None):
    """The blocks of W in the order they were quantized, and Ŵ in the original order."""
    W = W.copy()
    W[:, np.diag(C) == 0] = 0
    H = damped(C, config.damping)
    W_hat = np.zeros_like(W)
    sizes = [np.float16(math.sqrt(row @ row / row.size)) for row in W]
    rest, done, blocks = list(range(W.shape[1])), [], []
    while rest:
        current = remaining(W, W_hat, H, done, rest) if config.compensation else W[:, rest]
        chosen = _choose(current, rest, C, config, random_order)
        later = [j for j in rest if j not in chosen]
        block = Block(
            chosen,
            current[:, [rest.index(j) for j in chosen]],
            C[np.ix_(chosen, chosen)],
            conditional_cost(H, chosen, later),
        )
        _fit(block, config)
        blocks.append(block)
        # A stored value, times a trit, plus a stored value: each exact or rounded once to float32.
        alpha, mu = (as_stored(part, sizes, config.grid) for part in (block.alpha, block.mu))
        for place, j in enumerate(chosen):
            W_hat[:, j] = alpha * block.T[:, place].astype(np.float32) + mu
        rest, done = later, done + chosen
    return blocks, W_hat


def as_stored(values, sizes, grid):
    """What is read back of alpha or mu of a block, (n,) float32."""
    if grid == "float16":
        return values.astype(np.float16).astype(np.float32)
    shares = [abs(value) / float(size) for value, size in zip(values, sizes, strict=True) if size]
    factor = np.float16(max(shares, default=0) / 127)
    read_back = []
    for value, size in zip(values, sizes, strict=True):
        # The nearest of all that can be stored.
        codes = sorted(range(-127, 128), key=lambda code: abs(float(size) * float(factor) * code - value))
        read_back.append(np.float32(size) * np.float32(factor) * np.float32(codes[0]))
    return np.array(read_back, dtype=np.float32)


def _choose(current, rest, C, config, random_order):
    k = config.block_size
    if config.reorder == "none":
        return rest[:k]
    if config.reorder == "hessian":
        return sorted(sorted(rest, key=lambda j: (-C[j, j], j))[:k])
    if config.reorder == "random":
        return sorted([j for j in random_order if j in rest][:k])
    mean = current.mean(axis=1)
    similarities = []
    for column in current.T:
        lengths = math.sqrt(column @ column) * math.sqrt(mean @ mean)
        similarities.append(column @ mean / lengths if lengths else -math.inf)
    ranked = sorted(range(len(rest)), key=lambda i: (-similarities[i], i))
    return sorted(rest[i] for i in ranked[:k])


def _fit(block, config):
    W = block.W
    block.mu = W.mean(axis=1) if config.start == "asymmetric" else np.zeros(len(W))
    centred = W - block.mu[:, None]
    threshold = 0.75 * np.abs(centred).mean(axis=1)
    block.T = np.where(np.abs(centred) > threshold[:, None], np.sign(centred), 0).astype(int)
    block.alpha = np.array(
        [np.abs(row[t != 0]).mean() if t.any() else 0.0 for row, t in zip(centred, block.T, strict=True)]
    )
    block.weight_errors.append(block.weight_error())
    block.output_errors["init"] = block.output_error()
    if config.itf:
        _alternate(block, config.max_iterations)
    block.output_errors["itf"] = block.output_error()
    _align(block, config.aga)
    block.output_errors["aga"] = block.output_error()


def _alternate(block, limit):
    for _ in range(limit):
        _refit(block)
        candidates = np.stack([block.mu + t * block.alpha for t in (0, -1, 1)])
        nearest = np.abs(block.W - candidates[:, :, None]).argmin(axis=0)  # the first of equals: 0
        T = np.array([0, -1, 1])[nearest]
        unchanged = np.array_equal(T, block.T)
        block.T = T
        block.weight_errors.append(block.weight_error())
        if unchanged:
            return
    _refit(block)


def _refit(block):
    for i, (w, t) in enumerate(zip(block.W, block.T, strict=True)):
        block.alpha[i], block.mu[i] = _plain_grid(w, t)
    block.weight_errors.append(block.weight_error())


def _align(block, aga):
    if aga == "none":
        return
    root = square_root(block.cost if aga == "conditional" else block.C)
    for i, (w, t) in enumerate(zip(block.W, block.T, strict=True)):
        if aga == "printed":
            block.alpha[i], block.mu[i] = _weighted_grid(w, t, block.C.sum(axis=1))
        else:
            block.alpha[i], block.mu[i] = least_squares_grid(w, t, root)


def _weighted_grid(w, t, weights):
    if not np.ptp(t):
        return 0.0, w.mean()
    design = np.column_stack([t, np.ones(t.size)])
    return np.linalg.solve(design.T @ (weights[:, None] * design), design.T @ (weights * w))


def _plain_grid(w, t):
    """The grid of least distance; equal trits say nothing about the scale."""
    if not np.ptp(t):
        return np.array([0.0, w.mean()])
    return np.linalg.lstsq(np.column_stack([t, np.ones(t.size)]), w, rcond=None)[0]


def least_squares_grid(w, t, root):
    """The grid of least error under C = root rootᵀ; where that leaves a choice, the nearest to the plain one.

    An eigenvalue of Eq. 12 below 1e-12 of the larger one is a singular value of the design below 1e-6.
    """
    design = np.column_stack([t, np.ones(t.size)])
    plain = _plain_grid(w, t)
    return plain + np.linalg.lstsq(root.T @ design, root.T @ (w - design @ plain), rcond=1e-6)[0]
