"""Ternarize one weight matrix with compiled loops and few large products; see `reference.ternarize`.

If the order of the columns is known before the first block, one factor of the inverse of H serves all blocks.
SSR chooses columns block by block, so the inverse is updated after each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from scipy import linalg
from scipy.linalg import lapack

from harness.cpu.gptq import factor_damped, inverse
from harness.cpu.refine import refined, settle
from harness.cpu.rows import align_rows, feed_forward_rows, fit_rows
from reference import checks
from reference.aga import align_grid_printed
from reference.checks import Floats
from reference.grids import Stored, row_factor
from reference.joint import damped_objective
from reference.ssr import block_variance, select_block
from reference.types import FitReport, TernaryConfig, TernaryMatrix

__all__ = ["ternarize"]

STAGES = ("init", "itf", "aga")

# Columns of C in one panel of a quadratic form.
PANEL = 256


def ternarize(W: Any, C: Any, config: TernaryConfig = TernaryConfig()) -> TernaryMatrix:
    precision = np.asarray(W).dtype if np.asarray(W).dtype == np.float32 else np.float64
    W = checks.matrix(W, "W")
    C = checks.gram(C, W.shape[1])
    k = config.block_size
    W = np.where(np.diag(C) == 0, 0.0, W)
    known = None if config.reorder == "ssr" else _order(C, config)
    factor: Floats | None = None
    damping = 0.0
    if config.compensation or config.aga == "conditional" or config.feed_forward:
        factor, damping = factor_damped(
            C if known is None else C[np.ix_(known[::-1], known[::-1])], config.damping
        )
    elif config.refinement != "none":
        damping = config.damping

    remaining = _Chosen(W, factor, k) if known is None else _Known(W, factor, known, k)
    row = row_factor(W) if config.grid == "int8" else None
    scale, shift = Stored("scale", row), Stored("shift", row)
    figures = _Figures(config)
    trits, grids, blocks = [], [], []
    for B, W_B, L, half in remaining:
        C_BB = C[np.ix_(B, B)]
        whitening = None
        if L is not None:
            whitening, _ = lapack.dtrtri(L, lower=1)  # L⁻¹, so that (H⁻¹_BB)⁻¹ = L⁻ᵀ L⁻¹
        T, grid = _fit_block(W_B, C_BB, L, whitening, config, figures)
        alpha, mu = scale.add(grid[:, :1]), shift.add(grid[:, 1:])
        if config.compensation and half is not None and whitening is not None:
            E = W_B - (alpha * T + mu)
            remaining.subtract((E @ whitening.T) @ half)
        trits.append(T)
        grids.append(grid)
        blocks.append(B)

    order = np.concatenate(blocks)
    T = np.hstack(trits)
    errors: list[float] = []
    if config.refinement != "none":
        H = damped_objective(C, damping)
        if config.reorder != "none":
            H = H[np.ix_(order, order)]
        H = H.astype(precision, copy=False)
        target = W[:, order].astype(precision, copy=False)
        WH = target @ H
        power = float(np.einsum("ij,ij->", target, WH, dtype=np.float64))
        alpha, mu = (np.hstack([grid[:, i : i + 1] for grid in grids]) for i in (0, 1))
        rounds = config.rounds if config.refinement == "descent" else 0
        alpha, mu, T, errors = refined(target, WH, T, alpha, mu, H, k, rounds, config.symmetric)
        scale, shift = Stored("scale", row), Stored("shift", row)
        alpha = np.hstack([scale.add(column) for column in np.hsplit(alpha, len(blocks))])
        mu = np.hstack([shift.add(column) for column in np.hsplit(mu, len(blocks))])
        if rounds:
            settle(target, WH, T, alpha.astype(np.float64), mu.astype(np.float64), H, k)
        errors = [error / power if power > 0 else 0.0 for error in errors]

    result = TernaryMatrix(T, scale.grid(), None if config.symmetric else shift.grid(), order, k)
    return replace(result, report=figures.report(W, result, C, damping, tuple(errors)))


def _order(C: Floats, config: TernaryConfig) -> Any:
    """The order of the columns, ascending inside every block."""
    m, k = len(C), config.block_size
    if config.reorder == "hessian":
        order = np.argsort(-np.diag(C), kind="stable")
    elif config.reorder == "random":
        order = np.random.default_rng(config.seed).permutation(m)
    else:
        return np.arange(m)
    return np.concatenate([np.sort(order[first : first + k]) for first in range(0, m, k)])


class _Known:
    """The blocks of an order that is known; gives B, W_B, L and L⁻¹ H⁻¹_BR of each (None where not needed).

    L is the lower Cholesky factor of H⁻¹_BB. With H⁻¹ = UᵀU over all columns, it is U_BB transposed, and the
    other is U_BR. The lower factor of H with its columns reversed is the inverse of U, reversed.
    """

    def __init__(self, W: Floats, factor: Floats | None, order: Any, k: int) -> None:
        self.order, self.k = order, k
        self.W = W[:, order]
        self.U = None if factor is None else lapack.dtrtri(factor, lower=1)[0][::-1, ::-1]
        self.end = 0

    def __iter__(self) -> Any:
        m = len(self.order)
        for first in range(0, m, self.k):
            self.end = min(first + self.k, m)
            B, block = self.order[first : self.end], slice(first, self.end)
            W_B = np.ascontiguousarray(self.W[:, block])
            if self.U is None:
                yield B, W_B, None, None
            else:
                half = self.U[block, self.end :] if self.end < m else None
                yield B, W_B, np.asfortranarray(self.U[block, block].T), half

    def subtract(self, change: Floats) -> None:
        """Compensate the columns after the block."""
        self.W[:, self.end :] -= change


class _Chosen:
    """The blocks that SSR chooses, as `_Known` gives them."""

    def __init__(self, W: Floats, factor: Floats | None, k: int) -> None:
        self.rest = np.arange(W.shape[1])
        self.W, self.k = W, k
        self.Hinv = None if factor is None else inverse(factor)

    def __iter__(self) -> Any:
        while self.rest.size:
            B = select_block(self.W, self.k)
            R = np.delete(np.arange(self.rest.size), B)
            columns, W_B = self.rest[B], np.ascontiguousarray(self.W[:, B])
            self.rest, self.W = self.rest[R], self.W[:, R]
            L = half = None
            if self.Hinv is not None:
                L = linalg.cholesky(self.Hinv[np.ix_(B, B)], lower=True)
                if R.size:
                    half = linalg.solve_triangular(L, self.Hinv[np.ix_(B, R)], lower=True)
            yield columns, W_B, L, half
            if self.Hinv is not None and half is not None:
                # NumPy computes one triangle of such a product and mirrors it: the inverse stays symmetric.
                self.Hinv = self.Hinv[np.ix_(R, R)] - half.T @ half

    def subtract(self, change: Floats) -> None:
        """Compensate the columns that remain."""
        self.W -= change


def _fit_block(
    W_B: Floats,
    C_BB: Floats,
    L: Floats | None,
    whitening: Floats | None,
    config: TernaryConfig,
    figures: _Figures,
) -> tuple[Any, Floats]:
    """Run Algorithm 1 on one block, and feed its trits forward; return the trits, and alpha and mu (n, 2)."""
    limit = config.max_iterations if config.itf else 0
    twn = config.symmetric or config.start == "twn"
    start, T_start, grid, T, errors, steps = fit_rows(W_B, limit, twn, config.symmetric)
    cost = whitening.T @ whitening if config.aga == "conditional" and whitening is not None else C_BB
    fitted = grid if config.itf else start
    stages = [_residual(W_B, start, T_start), _residual(W_B, fitted, T)]

    def align(T: Any) -> Floats:
        if config.aga == "none":
            return fitted
        if config.aga == "printed":
            return np.hstack(align_grid_printed(W_B, T, C_BB))
        return align_rows(W_B, T, T.astype(np.float64) @ cost, cost.sum(axis=1), config.symmetric)

    grid = align(T)
    if config.feed_forward and L is not None:
        T = feed_forward_rows(W_B, grid, np.ascontiguousarray(L.T))
        grid = align(T)
    stages.append(_residual(W_B, grid, T))
    figures.add(errors, steps, stages, C_BB)
    return T, grid


def _residual(W: Floats, grid: Floats, T: Any) -> Floats:
    return W - (grid[:, :1] * T + grid[:, 1:])


class _Figures:
    """Accumulates the figures of the report."""

    def __init__(self, config: TernaryConfig) -> None:
        limit = config.max_iterations if config.itf else 0
        self.block_size = config.block_size
        self.curve = np.zeros(2 * limit + 2)
        self.steps = 1
        self.aligned = 0.0
        self.output_errors = np.zeros(len(STAGES))

    def add(self, errors: Floats, steps: int, stages: list[Floats], C_BB: Floats) -> None:
        """Add a block: E_w by half-step, and its residuals by stage."""
        self.curve += errors
        self.steps = max(self.steps, steps)
        self.aligned += float(np.square(stages[-1]).sum())
        E = np.concatenate(stages)
        self.output_errors += ((E @ C_BB) * E).reshape(len(STAGES), -1).sum(axis=1)

    def report(
        self,
        W: Floats,
        result: TernaryMatrix,
        C: Floats,
        damping: float,
        refinement_errors: tuple[float, ...],
    ) -> FitReport:
        """Return the report."""

        def share(value: float, total: float) -> float:
            return float(value / total) if total > 0 else 0.0

        norm = float(np.square(W).sum())
        power = _quadratic_form(W, C)
        error = _quadratic_form(W - result.dequantize(), C)
        return FitReport(
            damping=damping,
            weight_power=norm,
            output_power=power,
            iterations=(self.steps - 1) // 2,
            weight_errors=tuple(share(error, norm) for error in self.curve[: self.steps]),
            aligned_weight_error=share(self.aligned, norm),
            output_errors={
                stage: share(value, power) for stage, value in zip(STAGES, self.output_errors, strict=True)
            },
            variance_before=block_variance(W, self.block_size),
            variance_after=block_variance(W[:, result.permutation], self.block_size),
            relative_output_error=share(error, power),
            refinement_errors=refinement_errors,
        )


def _quadratic_form(E: Floats, C: Floats) -> float:
    """tr(E C Eᵀ) for a symmetric C, by little more than half of its products."""
    total = 0.0
    for first in range(0, len(C), PANEL):
        panel = slice(first, first + PANEL)
        own = E[:, panel]
        product = own @ C[panel, panel]
        if first:  # what lies above the diagonal panel equals what lies left of it
            product += 2 * (E[:, :first] @ C[:first, panel])
        total += float(np.einsum("ij,ij->", product, own))
    return total
