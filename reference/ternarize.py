"""One weight matrix from start to end: Fig. 2, Algorithm 1 in every block, errors passed on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import linalg

from reference import checks
from reference.aga import align_grid, align_grid_printed, output_error
from reference.atq import iterative_ternary_fitting, ternary_init, weight_error
from reference.checks import Floats, Trits
from reference.descent import descend
from reference.feedforward import round_fed_forward
from reference.gptq import compensate, eliminate, invert_damped
from reference.grids import Stored, row_factor
from reference.joint import damped_objective, whole_error
from reference.refine import refine
from reference.ssr import Indices, block_variance, permute, select_block
from reference.twn import symmetric_ternarize
from reference.types import FitReport, TernaryConfig, TernaryMatrix


def ternarize(W: ArrayLike, C: ArrayLike, config: TernaryConfig = TernaryConfig()) -> TernaryMatrix:
    """Ternarize one weight matrix by PT²-LLM, or with the steps beyond the paper that `config` asks for.

    Parameters
    ----------
    W : (n, m) array_like
        Weights.
    C : (m, m) array_like
        Gram matrix of the layer's calibration inputs.
    config : TernaryConfig
        Settings.

    Returns
    -------
    TernaryMatrix
        With the figures of the fit in ``report``.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, C is not symmetric or has a negative diagonal,
        or a scale or shift is beyond what ``config.grid`` holds.
    numpy.linalg.LinAlgError
        If the damped Gram matrix has no inverse (`reference.gptq.invert_damped`).

    Notes
    -----
    Until no column remains: choose a block B of the remaining columns (Eq. 16), fit it (Eq. 4-5,
    9-10), align its grid (Eq. 12), round alpha and mu to what is stored, move the error of the rounded
    block into the remaining columns, and eliminate B from the inverse of H. The order of the
    columns inside a block changes none of this but rounding fed forward; they ascend. Weights of dead inputs
    (zero diagonal of C) meet only zeros and are set to 0 first. A scale or shift below the least step of what
    is stored (6e-8 for float16) becomes 0, which the errors in the report show.

    A refinement begins from the grid before it is rounded. After the last joint grid alpha and mu are rounded
    to what is stored, and the descent runs once more on what that gives.

    Without a shift, mu is 0 in every step, and the result has none.
    """
    W = checks.matrix(W, "W")
    C = checks.gram(C, W.shape[1])
    columns = W.shape[1]
    W = np.where(np.diag(C) == 0, 0.0, W)

    order = _fixed_order(C, config)
    Hinv: Floats | None = None
    damping = 0.0
    if config.compensation or config.aga == "conditional" or config.feed_forward:
        Hinv, damping = invert_damped(C, config.damping)
    elif config.refinement != "none":
        damping = config.damping

    fits: list[_BlockFit] = []
    row = row_factor(W) if config.grid == "int8" else None
    scale, shift = Stored("scale", row), Stored("shift", row)
    blocks: list[Indices] = []
    rest = np.arange(columns)  # the original index of every remaining column
    W_rest = W
    while rest.size:
        if order is None:
            B = select_block(W_rest, config.block_size)
        else:
            B = np.flatnonzero(np.isin(rest, order[columns - rest.size :][: config.block_size]))
        R = np.delete(np.arange(rest.size), B)
        W_B = W_rest[:, B]
        C_BB = C[np.ix_(rest[B], rest[B])]
        Hinv_BB = None if Hinv is None else Hinv[np.ix_(B, B)]

        fit = _fit_block(W_B, C_BB, Hinv_BB, config)
        W_hat = scale.add(fit.alpha) * fit.T + shift.add(fit.mu)

        fits.append(fit)
        blocks.append(rest[B])
        W_rest = W_rest[:, R]
        if R.size and Hinv is not None:
            if config.compensation and Hinv_BB is not None:
                W_rest = compensate(W_rest, W_B - W_hat, Hinv_BB, Hinv[np.ix_(B, R)])
            Hinv = eliminate(Hinv, B, R)
        rest = rest[R]

    order = np.concatenate(blocks)
    trits = np.hstack([fit.T for fit in fits])
    errors: list[float] = []
    if config.refinement != "none":
        k, descends = config.block_size, config.refinement == "descent"
        H = damped_objective(C, damping)[np.ix_(order, order)]
        alpha, mu = np.hstack([fit.alpha for fit in fits]), np.hstack([fit.mu for fit in fits])
        alpha, mu, trits, errors = refine(
            W[:, order], trits, alpha, mu, H, k, config.rounds, descends, config.symmetric
        )
        scale, shift = Stored("scale", row), Stored("shift", row)
        alpha = np.hstack([scale.add(column) for column in np.hsplit(alpha, len(fits))])
        mu = np.hstack([shift.add(column) for column in np.hsplit(mu, len(fits))])
        if descends:
            trits = descend(W[:, order], trits, alpha, mu, H, k)
        power = whole_error(W[:, order], np.zeros_like(W), H)
        errors = [_share(error, power) for error in errors]

    result = TernaryMatrix(
        trits=trits,
        scale=scale.grid(),
        shift=None if config.symmetric else shift.grid(),
        permutation=order,
        block_size=config.block_size,
    )
    return replace(result, report=_report(W, C, result, fits, damping, errors))


@dataclass
class _BlockFit:
    """One block after each stage."""

    alpha: Floats
    mu: Floats
    T: Trits
    weight_errors: list[float]  # at the start and after every half-step of ITF
    aligned_weight_error: float = 0.0
    output_errors: dict[str, float] = field(default_factory=dict)


def _fit_block(W_B: Floats, C_BB: Floats, Hinv_BB: Floats | None, config: TernaryConfig) -> _BlockFit:
    """Algorithm 1 on one block, and its trits fed forward."""
    if config.start == "twn" or config.symmetric:
        alpha, T = symmetric_ternarize(W_B)
        mu = np.zeros_like(alpha)
    else:
        alpha, mu, T = ternary_init(W_B)
    fit = _BlockFit(alpha, mu, T, [weight_error(W_B, alpha, mu, T)])
    fit.output_errors["init"] = output_error(W_B, alpha * T + mu, C_BB)
    if config.itf:
        fit.alpha, fit.mu, fit.T, fit.weight_errors = iterative_ternary_fitting(
            W_B, config.max_iterations, (alpha, mu, T), config.symmetric
        )
    fit.output_errors["itf"] = output_error(W_B, fit.alpha * fit.T + fit.mu, C_BB)
    cost = C_BB
    if config.aga == "conditional" and Hinv_BB is not None:
        cost = linalg.cho_solve(linalg.cho_factor(Hinv_BB), np.eye(len(Hinv_BB)))

    def align() -> None:
        if config.aga in ("exact", "conditional"):
            fit.alpha, fit.mu = align_grid(W_B, fit.T, cost, config.symmetric)
        elif config.aga == "printed":
            fit.alpha, fit.mu = align_grid_printed(W_B, fit.T, C_BB)

    align()
    if config.feed_forward and Hinv_BB is not None:
        fit.T = round_fed_forward(W_B, fit.alpha, fit.mu, Hinv_BB)
        align()
    fit.aligned_weight_error = weight_error(W_B, fit.alpha, fit.mu, fit.T)
    fit.output_errors["aga"] = output_error(W_B, fit.alpha * fit.T + fit.mu, C_BB)
    return fit


def _fixed_order(C: Floats, config: TernaryConfig) -> Indices | None:
    """The order of the columns where it is known before the first block; None for SSR."""
    columns = C.shape[0]
    if config.reorder == "ssr":
        return None
    if config.reorder == "hessian":
        return np.argsort(-np.diag(C), kind="stable")
    if config.reorder == "random":
        return np.random.default_rng(config.seed).permutation(columns)
    return np.arange(columns)


def _share(value: float, total: float) -> float:
    return value / total if total > 0 else 0.0


def _report(
    W: Floats,
    C: Floats,
    result: TernaryMatrix,
    fits: list[_BlockFit],
    damping: float,
    refinement_errors: list[float],
) -> FitReport:
    steps = max(len(f.weight_errors) for f in fits)
    curve = [sum(f.weight_errors[min(s, len(f.weight_errors) - 1)] for f in fits) for s in range(steps)]
    norm = float(np.square(W).sum())
    power = output_error(W, np.zeros_like(W), C)
    return FitReport(
        damping=damping,
        weight_power=norm,
        output_power=power,
        iterations=(steps - 1) // 2,  # a block that hit the limit ends with one more grid
        weight_errors=tuple(_share(e, norm) for e in curve),
        aligned_weight_error=_share(sum(f.aligned_weight_error for f in fits), norm),
        output_errors={
            stage: _share(sum(f.output_errors[stage] for f in fits), power)
            for stage in ("init", "itf", "aga")
        },
        variance_before=block_variance(W, result.block_size),
        variance_after=block_variance(permute(W, result.permutation), result.block_size),
        relative_output_error=_share(output_error(W, result.dequantize(), C), power),
        refinement_errors=tuple(refinement_errors),
    )
