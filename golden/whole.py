"""Ternarize a whole matrix by the steps of an `Arithmetic`, independently of `reference.ternarize`.

The two differ in kind in compensation: here, no inverse is kept and updated. The remaining columns R are
computed from the original weights and the errors of all quantized columns Q, as
W_R + (W_Q - Ŵ_Q) H_QR H_RR⁻¹. Rounding fed forward does the same with every column of a block in turn.
`golden.refinement` says how the refinement differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from golden.arithmetic import Array, Grid
from golden.refinement import Kit, damped_objective, dequantized, descend, refine

# Defaults of `reference.types.TernaryConfig`, repeated here; the settings of a case override them.
DEFAULTS: dict[str, Any] = {
    "block_size": 128,
    "shift": "free",
    "start": "asymmetric",
    "reorder": "ssr",
    "itf": True,
    "aga": "exact",
    "compensation": True,
    "damping": 0.01,
    "max_iterations": 100,
    "grid": "float16",
    "feed_forward": False,
    "refinement": "none",
    "rounds": 4,
}


def select_block(kit: Kit, W: Array, k: int) -> list[int]:
    """Eq. 16: the k columns most similar to the mean, ascending; ties go to the lower index."""
    keys = kit.similarities(W)
    order = sorted(range(len(keys)), key=lambda j: (keys[j] is None, -(keys[j] or 0), j))
    if k < len(order):
        last, next_ = keys[order[k - 1]], keys[order[k]]
        if last is not None and next_ is not None:
            largest = max(abs(key) for key in keys if key is not None)
            kit.note(abs(last - next_) / largest if largest else 0)
    return sorted(order[:k])


def first(kit: Kit, W: Array, symmetric: bool) -> tuple[Array, Array, Array]:
    """Where a block starts: Eq. 1-3 with mu = 0, or Eq. 4-5."""
    if not symmetric:
        return kit.ternary_init(W)
    alpha, T = kit.symmetric(W)
    return alpha, alpha * 0, T


def fit(
    kit: Kit, W: Array, start: tuple[Array, Array, Array], rounds: int, symmetric: bool
) -> tuple[Any, Any, Any, list]:
    """Loop of Algorithm 1 over all rows at once: Eq. 9 and Eq. 10, until no trit changes."""
    alpha, mu, T = start
    errors = [kit.weight_error(W - alpha * T - mu)]
    for _ in range(rounds):
        alpha, mu = kit.grid(W, T, symmetric)
        errors.append(kit.weight_error(W - alpha * T - mu))
        rounded = kit.round(W, alpha, mu)
        errors.append(kit.weight_error(W - alpha * rounded - mu))
        if (rounded == T).all():
            return alpha, mu, T, errors
        T = rounded
    alpha, mu = kit.grid(W, T, symmetric)
    return alpha, mu, T, [*errors, kit.weight_error(W - alpha * T - mu)]


def damped(kit: Kit, C: Array, damping: float) -> tuple[Array, float]:
    """Return H and its damping: increased tenfold until H is positive definite, at most to 1."""
    while True:
        H = C + kit.numbers(damping) * np.diag(C).sum() / len(C) * kit.numbers(np.eye(len(C)))
        for j in np.flatnonzero(np.diag(C) == 0):
            H[j, j] = kit.numbers(1.0)[()]
        if kit.positive_definite(H):
            return H, damping
        if not 0 < damping * 10 <= 1:
            raise ArithmeticError("no damping makes the Gram matrix positive definite")
        damping *= 10


def block_variance(kit: Kit, W: Array, block_size: int) -> Any:
    """Variance within blocks, each block weighted by its number of columns."""
    total = 0
    for b in range(0, W.shape[1], block_size):
        block = W[:, b : b + block_size]
        total = total + kit.weight_error(block - kit.row_means(block)) / len(W)
    return total / W.shape[1]


def remaining(kit: Kit, W: Array, W_hat: Array, H: Array, done: list[int], rest: list[int]) -> Array:
    """Compute the columns `rest` of W, compensated for the errors of the columns `done`."""
    if not done:
        return W[:, rest]
    error = W[:, done] - kit.numbers(W_hat[:, done])
    return W[:, rest] + error @ kit.solve(H[np.ix_(rest, rest)], H[np.ix_(rest, done)]).T


def conditional_cost(kit: Kit, H: Array, block: list[int], later: list[int]) -> Array:
    """Cost matrix of a block after compensation: H_BB minus what later columns can compensate."""
    cost = H[np.ix_(block, block)]
    if later:
        cost = cost - H[np.ix_(block, later)] @ kit.solve(H[np.ix_(later, later)], H[np.ix_(later, block)])
    return cost


def round_fed_forward(
    kit: Kit, W: Array, alpha: Array, mu: Array, H: Array, block: list[int], later: list[int]
) -> Array:
    """Round the columns `block` of W one by one, each compensated for the errors of those before it."""
    columns = []
    W_hat = W.copy()
    for place, j in enumerate(block):
        w = remaining(kit, W, W_hat, H, block[:place], block[place:] + later)[:, :1]
        columns.append(kit.round(w, alpha, mu))
        W_hat[:, j : j + 1] = alpha * columns[-1] + mu
    return np.hstack(columns)


def ternarize(
    kit: Kit, W: Array, C: Array, order: list[int] | None = None, **settings: Any
) -> dict[str, Array]:
    """Compute all fields of a `TernaryMatrix` and its report; `order` is for ``reorder="random"``."""
    config = {**DEFAULTS, **settings}
    k, columns = config["block_size"], W.shape[1]
    W = W.copy()
    W[:, np.diag(C) == 0] = kit.numbers(0.0)[()]
    H, damping = C, 0.0
    if config["compensation"] or config["aga"] == "conditional" or config["feed_forward"]:
        H, damping = damped(kit, C, config["damping"])
    elif config["refinement"] != "none":
        damping = config["damping"]

    W_hat = np.zeros(W.shape, dtype=np.float32)
    stored = _Float16(kit) if config["grid"] == "float16" else _EightBits(kit, W)
    trits, fits = [], []
    done: list[int] = []
    rest = list(range(columns) if order is None else order)
    if config["reorder"] == "hessian":
        rest.sort(key=lambda j: -C[j, j])
    while rest:
        now = remaining(kit, W, W_hat, H, done, rest) if config["compensation"] else W[:, rest]
        chosen = select_block(kit, now, k) if config["reorder"] == "ssr" else range(min(k, len(rest)))
        B = sorted(rest[j] for j in chosen)
        W_B = now[:, [rest.index(j) for j in B]]
        rest = [j for j in rest if j not in B]
        cost = conditional_cost(kit, H, B, rest) if config["aga"] == "conditional" else C[np.ix_(B, B)]

        def feed_forward(
            alpha: Array, mu: Array, W_B: Array = W_B, B: list[int] = B, rest: list[int] = rest
        ) -> Array:
            compensated = W.copy()
            compensated[:, B] = W_B
            return round_fed_forward(kit, compensated, alpha, mu, H, B, rest)

        result = _fit_block(
            kit, W_B, C[np.ix_(B, B)], cost, feed_forward if config["feed_forward"] else None, config
        )
        alpha, mu = stored.add("scale", result["alpha"]), stored.add("shift", result["mu"])
        W_hat[:, B] = alpha * result["T"] + mu
        trits.append(result["T"])
        fits.append(result)
        done += B

    T, shares = np.hstack(trits), np.zeros(0)
    if config["refinement"] != "none":
        target, H = W[:, done], damped_objective(kit, C, damping)[np.ix_(done, done)]
        alpha, mu = (np.hstack([f[name] for f in fits]) for name in ("alpha", "mu"))
        descent, symmetric = config["refinement"] == "descent", config["shift"] == "none"
        alpha, mu, T, errors = refine(kit, target, T, alpha, mu, H, k, config["rounds"], descent, symmetric)
        shares = _shares(errors, kit.output_error(target, H))
        stored = _Float16(kit) if config["grid"] == "float16" else _EightBits(kit, W)
        alpha, mu = (
            np.hstack([stored.add(name, values[:, b : b + 1]) for b in range(len(fits))])
            for name, values in (("scale", alpha), ("shift", mu))
        )
        if descent:
            T = descend(kit, target, T, kit.numbers(alpha), kit.numbers(mu), H, k)
        W_hat[:, done] = dequantized(T, alpha, mu, k)

    power = kit.output_error(W, C)
    norm = kit.weight_error(W)
    steps = max(len(f["weight"]) for f in fits)
    curve = [sum(f["weight"][min(s, len(f["weight"]) - 1)] for f in fits) for s in range(steps)]
    stages = [sum(f["output"][stage] for f in fits) for stage in range(3)]
    error = kit.output_error(W - kit.numbers(W_hat), C)
    arrays = stored.arrays()
    if config["shift"] == "none":
        arrays = {name: array for name, array in arrays.items() if not name.startswith("shift")}
    return {
        "trits": T,
        **arrays,
        "permutation": np.array(done, dtype=np.int64),
        "weights": W_hat,
        "report.damping": np.array(damping),
        "report.weight_power": _shares(norm, 1),
        "report.output_power": _shares(power, 1),
        "report.iterations": np.array((steps - 1) // 2),
        "report.weight_errors": _shares(curve, norm),
        "report.aligned_weight_error": _shares(sum(f["aligned"] for f in fits), norm),
        "report.output_errors": _shares(stages, power),
        "report.variance_before": _shares(block_variance(kit, W, k), 1),
        "report.variance_after": _shares(block_variance(kit, W[:, done], k), 1),
        "report.relative_output_error": _shares(error, power),
        "report.refinement_errors": shares,
    }


class _Float16:
    """Stores alpha and mu of the blocks as float16."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.blocks: dict[str, list[Array]] = {"scale": [], "shift": []}

    def add(self, name: str, value: Array) -> Array:
        """Store the values of a block; return the stored values in float32."""
        self.blocks[name].append(self.kit.stored(value))
        return self.blocks[name][-1].astype(np.float32)

    def arrays(self) -> dict[str, Array]:
        """Return the stored arrays of all blocks, by the field names of a `TernaryMatrix`."""
        return {name: np.hstack(blocks) for name, blocks in self.blocks.items()}


class _EightBits:
    """Stores alpha and mu as 8-bit codes, with a factor per row and per block."""

    def __init__(self, kit: Kit, W: Array) -> None:
        self.kit = kit
        self.row = kit.row_factor(W)
        self.blocks: dict[str, list[tuple[Array, Array]]] = {"scale": [], "shift": []}

    def add(self, name: str, value: Array) -> Array:
        codes, block = self.kit.coded(value, self.kit.numbers(self.row))
        self.blocks[name].append((codes, block))
        return self.row.astype(np.float32) * block.astype(np.float32) * codes

    def arrays(self) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        for name, blocks in self.blocks.items():
            codes, factors = zip(*blocks, strict=True)
            arrays |= {
                f"{name}.codes": np.hstack(codes),
                f"{name}.row": self.row,
                f"{name}.block": np.hstack(factors),
            }
        return arrays


def _fit_block(
    kit: Kit,
    W: Array,
    C: Array,
    cost: Array,
    feed_forward: Callable[[Array, Array], Array] | None,
    config: dict[str, Any],
) -> dict[str, Any]:
    symmetric = config["shift"] == "none"
    alpha, mu, T = first(kit, W, symmetric or config["start"] == "twn")
    weight = [kit.weight_error(W - alpha * T - mu)]
    output = [kit.output_error(W - alpha * T - mu, C)]
    if config["itf"]:
        alpha, mu, T, weight = fit(kit, W, (alpha, mu, T), config["max_iterations"], symmetric)
    output.append(kit.output_error(W - alpha * T - mu, C))

    def aligned(T: Array) -> Grid:
        if config["aga"] in ("exact", "conditional"):
            return kit.align(W, T, cost, symmetric)
        return kit.align_printed(W, T, C) if config["aga"] == "printed" else (alpha, mu)

    grid = aligned(T)
    if feed_forward:
        T = feed_forward(*grid)
        grid = aligned(T)
    residual = W - grid[0] * T - grid[1]
    output.append(kit.output_error(residual, C))
    return {
        "alpha": grid[0],
        "mu": grid[1],
        "T": T,
        "weight": weight,
        "aligned": kit.weight_error(residual),
        "output": output,
    }


def _shares(values: Any, total: Any) -> Array:
    array = np.asarray(values, dtype=object)
    return np.vectorize(lambda value: float(value / total) if total else 0.0, otypes=[float])(array)
