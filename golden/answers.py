"""Compute the answer to every operation, and state where it comes from.

Answers are arrays by name, in the order in which the function returns them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from golden import layout, refinement, whole
from golden.arithmetic import Array, Exact
from golden.cases import Tensors
from golden.refinement import Kit

# Largest width for which all assignments of trits to a row are enumerated (3^7 = 2187).
BRUTE_FORCE_COLUMNS = 7

ORIGINS = {
    "exact": {
        "twn.symmetric_ternarize": "Eq. 1-3 in rational arithmetic",
        "atq.ternary_init": "Eq. 4-5 in rational arithmetic",
        "atq.weight_error": "sum of squares in rational arithmetic",
        "atq.weight_error_gradient": "central differences, exact for a quadratic function, in rational "
        "arithmetic",
        "atq.build_optimal_grid": "normal equations of Eq. 8 by Cramer's rule in rational arithmetic; with "
        "mu = 0 the lowest point of a parabola",
        "atq.flexible_round": "the best of all 3^m assignments of trits to the row, up to 7 columns, else of "
        "the three values for each weight, in rational arithmetic; of equal ones that with the fewest "
        "non-zero trits",
        "atq.iterative_ternary_fitting": "Algorithm 1 in rational arithmetic, each weight given the best of "
        "the three trits; decisions are exact ties, or far from their thresholds",
        "aga.output_error": "quadratic form in rational arithmetic",
        "aga.output_error_gradient": "central differences, exact for a quadratic function, in rational "
        "arithmetic",
        "aga.align_grid": "Eq. 12 by Cramer's rule in rational arithmetic; of a singular system the "
        "correction of least norm; with mu = 0 the lowest point of a parabola",
        "aga.align_grid_printed": "Eq. 13 as printed, in rational arithmetic",
        "ssr.permute": "columns copied one by one",
        "ssr.cosine_similarity": "rational dot products, root to 60 digits, rounded once",
        "ssr.select_block": "squared cosines compared as rational numbers",
        "ssr.block_variance": "definition in rational arithmetic",
        "gptq.gram": "integer sums",
        "gptq.damp": "definition in rational arithmetic",
        "gptq.invert_damped": "elimination in rational arithmetic; damping raised until all pivots are "
        "positive",
        "gptq.compensate": "W_R + E H_BR H_RR⁻¹ with H itself, in rational arithmetic",
        "gptq.eliminate": "H_RR inverted by elimination in rational arithmetic",
        "feedforward.round_fed_forward": "columns compensated by solving with H over all later columns, each "
        "given the best of the three values, in rational arithmetic",
        "targets.lost_products": "token by token in rational arithmetic",
        "targets.token_weights": "definition in rational arithmetic, one token at a time",
        "targets.shift_targets": "W* H = W H + s D over the live inputs, by elimination in rational "
        "arithmetic",
        "joint.whole_error": "quadratic form in rational arithmetic",
        "joint.damped_objective": "definition in rational arithmetic, one diagonal entry at a time",
        "joint.spread": "values copied column by column",
        "joint.align_jointly": "the rows of P written out, P H Pᵀ with its ridge solved by elimination, in "
        "rational arithmetic",
        "descent.descend": "all three trits tried by the error of the whole row, in rational arithmetic",
        "refine.refine": "joint grid and descent in turn, each as by itself, in rational arithmetic",
        "ternarize.ternarize": "all steps in rational arithmetic, compensation by solving with H_RR, descent "
        "by trying all three trits",
        "grids.row_factor": "mean of squares in rational arithmetic, root to 60 digits, rounded once",
        "grids.encode": "definition in rational arithmetic, one value at a time",
        "packing.pack_base3": "positional notation, one trit at a time",
        "packing.unpack_base3": "the trits that were packed, one at a time",
        "packing.pack_2bit": "positional notation, one trit at a time",
        "packing.unpack_2bit": "the trits that were packed, one at a time",
        "layout.lay_words": "every digit added to the word that the description names",
        "layout.lay_grid": "the pair of every column of the matrix in the place that the description names",
        "layout.lay_out": "every digit, pair and index in the place that the description names",
        "layout.join": "the answers for the parts, one after the other",
        "matmul.matmul": "product with the dense matrix in rational arithmetic",
    },
    "real": {
        "twn.symmetric_ternarize": "Eq. 1-3 with sums that are rounded once",
        "atq.ternary_init": "Eq. 4-5 with sums that are rounded once",
        "atq.weight_error": "sum of squares, rounded once",
        "atq.weight_error_gradient": "central differences of a quadratic function",
        "atq.build_optimal_grid": "dense least squares in [t, 1], or with mu = 0 in [t]",
        "atq.flexible_round": "argmin over the three values of the grid",
        "atq.iterative_ternary_fitting": "dense least squares and argmin over the three values in turn",
        "aga.output_error": "squared norm of (W - Ŵ) C^½, the root from an eigendecomposition",
        "aga.output_error_gradient": "central differences of a quadratic function",
        "aga.align_grid": "dense least squares against w C^½, the root from an eigendecomposition",
        "aga.align_grid_printed": "least squares weighted by the row sums of C",
        "ssr.permute": "columns copied one by one",
        "ssr.cosine_similarity": "every cosine by itself, sums rounded once",
        "ssr.select_block": "cosines with the mean column one by one, sums rounded once, then sorted",
        "ssr.block_variance": "definition, sums rounded once",
        "gptq.gram": "every entry a sum that is rounded once",
        "gptq.damp": "definition",
        "gptq.invert_damped": "eigendecomposition of H",
        "gptq.compensate": "W_R + E H_BR H_RR⁻¹ by a dense solve with H itself",
        "gptq.eliminate": "H_RR inverted by a dense solve",
        "ternarize.ternarize": "composition of the other real answers, compensation by a dense solve with "
        "H_RR for all quantized columns at once, descent by trying all three trits",
        "packing.pack_base3": "positional notation, one trit at a time",
        "packing.unpack_base3": "the trits that were packed, one at a time",
        "packing.pack_2bit": "positional notation, one trit at a time",
        "packing.unpack_2bit": "the trits that were packed, one at a time",
        "matmul.matmul": "product with the dense matrix, sums rounded once",
    },
}


def answer(kit: Kit, operation: str, inputs: Tensors, parameters: dict[str, Any]) -> Tensors:
    """Compute the answer to one call.

    `inputs` may hold ``H`` if the tested function takes blocks of its inverse.
    """
    if operation in layout.ANSWERS:  # these depend on the types of floats, and need no arithmetic
        return layout.ANSWERS[operation](**inputs, **parameters)
    given: dict[str, Array] = {
        name: value if value.dtype.kind in "iub" else kit.numbers(value) for name, value in inputs.items()
    }
    result = _ANSWERS[operation](kit, **given, **parameters)
    return {name: _plain(value) for name, value in result.items()}


def _plain(value: Any) -> Array:
    array = np.asarray(value)
    return array.astype(np.float64) if array.dtype == object else array


def _ternary_init(kit: Kit, W: Array) -> dict[str, Any]:
    return dict(zip(("alpha", "mu", "T"), kit.ternary_init(W), strict=True))


def _round(kit: Kit, W: Array, alpha: Array, mu: Array) -> dict[str, Any]:
    T = kit.round(W, alpha, mu)
    if isinstance(kit, Exact) and W.shape[1] <= BRUTE_FORCE_COLUMNS:
        T = np.array([_best_row(*row) for row in zip(W, alpha[:, 0], mu[:, 0], strict=True)], dtype=np.int8)
    return {"T": T}


def _best_row(w: Array, alpha: Any, mu: Any) -> tuple[int, ...]:
    def error(row: tuple[int, ...]) -> Any:
        return sum((x - alpha * t - mu) ** 2 for x, t in zip(w, row, strict=True))

    return min(itertools.product((0, 1, -1), repeat=len(w)), key=lambda row: (error(row), sum(map(abs, row))))


def _fitting(
    kit: Kit, W: Array, max_iterations: int = 100, symmetric: bool = False, **start: Array
) -> dict[str, Any]:
    if start:
        first = start["start.alpha"], start["start.mu"], start["start.T"]
    else:
        first = whole.first(kit, W, symmetric)
    result = whole.fit(kit, W, first, max_iterations, symmetric)
    return dict(zip(("alpha", "mu", "T", "errors"), result, strict=True))


def _gradient(
    kit: Kit, error: Callable[[Array], Any], W: Array, alpha: Array, mu: Array, T: Array
) -> dict[str, Any]:
    """Central differences, row by row; exact at any step, because a quadratic has no third derivative."""
    one: Any = kit.numbers(1.0)[()]
    gradients = np.zeros((2, len(W), 1), dtype=object)
    for i in range(len(W)):
        row = slice(i, i + 1)
        for g, (da, dm) in enumerate(((one, one * 0), (one * 0, one))):
            ends = [error(W[row] - (alpha[row] + s * da) * T[row] - (mu[row] + s * dm)) for s in (1, -1)]
            gradients[g, i, 0] = (ends[0] - ends[1]) / 2
    return {"d_alpha": gradients[0], "d_mu": gradients[1]}


def _weight_gradient(kit: Kit, W: Array, alpha: Array, mu: Array, T: Array) -> dict[str, Any]:
    return _gradient(kit, kit.weight_error, W, alpha, mu, T)


def _output_gradient(kit: Kit, W: Array, alpha: Array, mu: Array, T: Array, C: Array) -> dict[str, Any]:
    return _gradient(kit, lambda E: kit.output_error(E, C), W, alpha, mu, T)


def _permute(kit: Kit, A: Array, permutation: Array) -> dict[str, Any]:
    return {"permuted": np.stack([A[:, j] for j in permutation], axis=1)}


def _invert(kit: Kit, C: Array, damping: float) -> dict[str, Any]:
    H, used = whole.damped(kit, C, damping)
    if isinstance(kit, Exact):
        return {"Hinv": kit.solve(H, kit.numbers(np.eye(len(H)))), "damping": used}
    values, vectors = np.linalg.eigh(H)
    return {"Hinv": (vectors / values) @ vectors.T, "damping": used}


def _compensate(kit: Kit, W_R: Array, E: Array, H: Array, **_: Array) -> dict[str, Any]:
    B, R = range(E.shape[1]), range(E.shape[1], len(H))
    return {"W_R": W_R + E @ kit.solve(H[np.ix_(R, R)], H[np.ix_(R, B)]).T}


def _eliminate(kit: Kit, B: Array, R: Array, H: Array, **_: Array) -> dict[str, Any]:
    return {"Hinv": kit.solve(H[np.ix_(R, R)], kit.numbers(np.eye(len(R))))}


def _feed_forward(kit: Kit, W: Array, alpha: Array, mu: Array, H: Array, **_: Array) -> dict[str, Any]:
    """H covers the columns of W, and those that remain after them, which the tested function never sees."""
    n, k = W.shape
    later = list(range(k, len(H)))
    wider = np.hstack([W, kit.numbers(np.zeros((n, len(later))))])
    return {"T": whole.round_fed_forward(kit, wider, alpha, mu, H, list(range(k)), later)}


def _lost_products(kit: Kit, Y: Array, W: Array, X_hat: Array, omega: Array | None = None) -> dict[str, Any]:
    D = kit.numbers(np.zeros(W.shape))
    for token, (y, x) in enumerate(zip(Y, X_hat, strict=True)):
        for i, w in enumerate(W):
            lost = y[i] - w @ x
            D[i] = D[i] + (lost if omega is None else omega[token, 0] * lost) * x
    return {"D": D}


def _token_weights(kit: Kit, h: Array) -> dict[str, Any]:
    return {"omega": [[len(x) / (x @ x) if any(x) else x[0]] for x in h]}


def _shift_targets(
    kit: Kit, W: Array, C: Array, D: Array, damping: float = 0.1, strength: float = 1.0
) -> dict[str, Any]:
    H, _ = whole.damped(kit, C, damping)
    alive = np.flatnonzero(np.diag(C) != 0)
    W_star = W.copy()
    if alive.size:
        H = H[np.ix_(alive, alive)]
        wanted = W[:, alive] @ H + kit.numbers(strength) * D[:, alive]
        W_star[:, alive] = kit.solve(H, wanted.T).T
    return {"W_star": W_star}


def _refine(kit: Kit, **given: Any) -> dict[str, Any]:
    return dict(zip(("alpha", "mu", "T", "errors"), refinement.refine(kit, **given), strict=True))


def _pack(kit: Kit, trits: Array, base: int, places: int) -> dict[str, Any]:
    packed = []
    for row in trits.reshape(int(np.prod(trits.shape[:-1])), -1).tolist():
        row += [0] * (-len(row) % places)
        packed.append(
            [
                sum((t + 1) * base**i for i, t in enumerate(row[b : b + places]))
                for b in range(0, len(row), places)
            ]
        )
    shape = (*trits.shape[:-1], -(-trits.shape[-1] // places))
    return {"packed": np.array(packed, dtype=np.uint8).reshape(shape)}


def _unpack(kit: Kit, packed: Array, count: int, base: int, places: int) -> dict[str, Any]:
    rows = [
        [byte // base**i % base - 1 for byte in row for i in range(places)][:count]
        for row in packed.reshape(int(np.prod(packed.shape[:-1])), -1).tolist()
    ]
    return {"trits": np.array(rows, dtype=np.int8).reshape(*packed.shape[:-1], count)}


def _matmul(
    kit: Kit, x: Array, packed: Array, scale: Array, shift: Array, permutation: Array, block_size: int
) -> dict[str, Any]:
    T = _unpack(kit, packed, len(permutation), 3, 5)["trits"]
    W_hat = np.empty(T.shape, dtype=x.dtype)
    for j, column in enumerate(permutation):
        W_hat[:, column] = scale[:, j // block_size] * T[:, j] + shift[:, j // block_size]
    return {"y": kit.product(x, W_hat.T)}


_ANSWERS: dict[str, Callable[..., dict[str, Any]]] = {
    "twn.symmetric_ternarize": lambda kit, W: dict(zip(("alpha", "T"), kit.symmetric(W), strict=True)),
    "atq.ternary_init": _ternary_init,
    "atq.weight_error": lambda kit, W, alpha, mu, T: {"error": kit.weight_error(W - alpha * T - mu)},
    "atq.weight_error_gradient": _weight_gradient,
    "atq.build_optimal_grid": lambda kit, **given: dict(zip(("alpha", "mu"), kit.grid(**given), strict=True)),
    "atq.flexible_round": _round,
    "atq.iterative_ternary_fitting": _fitting,
    "aga.output_error": lambda kit, W, W_hat, C: {"error": kit.output_error(W - W_hat, C)},
    "aga.output_error_gradient": _output_gradient,
    "aga.align_grid": lambda kit, **given: dict(zip(("alpha", "mu"), kit.align(**given), strict=True)),
    "aga.align_grid_printed": lambda kit, W, T, C: dict(
        zip(("alpha", "mu"), kit.align_printed(W, T, C), strict=True)
    ),
    "ssr.permute": _permute,
    "ssr.cosine_similarity": lambda kit, W: {"S": kit.cosines(W)},
    "ssr.select_block": lambda kit, W, k: {"indices": np.array(whole.select_block(kit, W, k))},
    "ssr.block_variance": lambda kit, W, block_size: {"variance": whole.block_variance(kit, W, block_size)},
    "gptq.gram": lambda kit, X: {"C": kit.gram(X)},
    "gptq.damp": lambda kit, C, damping: {
        "H": C + kit.numbers(damping) * np.diag(C).sum() / len(C) * kit.numbers(np.eye(len(C)))
    },
    "gptq.invert_damped": _invert,
    "gptq.compensate": _compensate,
    "gptq.eliminate": _eliminate,
    "feedforward.round_fed_forward": _feed_forward,
    "targets.lost_products": _lost_products,
    "targets.token_weights": _token_weights,
    "targets.shift_targets": _shift_targets,
    "joint.whole_error": lambda kit, W, W_hat, H: {"error": kit.output_error(W - W_hat, H)},
    "joint.damped_objective": lambda kit, C, damping: {"H": refinement.damped_objective(kit, C, damping)},
    "joint.spread": lambda kit, grid, columns, block_size: {
        "columns": refinement.spread(grid, columns, block_size)
    },
    "joint.align_jointly": lambda kit, **given: dict(
        zip(("alpha", "mu"), refinement.align_jointly(kit, **given), strict=True)
    ),
    "descent.descend": lambda kit, **given: {"T": refinement.descend(kit, **given)},
    "refine.refine": _refine,
    "ternarize.ternarize": lambda kit, W, C, **config: whole.ternarize(kit, W, C, **config),
    "grids.row_factor": lambda kit, W: {"row": kit.row_factor(W)},
    "grids.encode": lambda kit, value, row: dict(zip(("codes", "block"), kit.coded(value, row), strict=True)),
    "packing.pack_base3": lambda kit, trits: _pack(kit, trits, 3, 5),
    "packing.unpack_base3": lambda kit, packed, count: _unpack(kit, packed, count, 3, 5),
    "packing.pack_2bit": lambda kit, trits: _pack(kit, trits, 4, 4),
    "packing.unpack_2bit": lambda kit, packed, count: _unpack(kit, packed, count, 4, 4),
    "matmul.matmul": _matmul,
}
