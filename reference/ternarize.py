"""One weight matrix from start to end: Fig. 2, Algorithm 1 in every block, errors passed on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import linalg

from reference import checks
from reference.aga import align_grid, align_grid_printed, output_error
from reference.atq import iterative_ternary_fitting, ternary_init, weight_error
from reference.checks import Floats, Trits
from reference.gptq import compensate, eliminate, invert_damped
from reference.grids import encode, row_factor
from reference.ssr import Indices, block_variance, permute, select_block
from reference.twn import symmetric_ternarize
from reference.types import CodedGrid, FitReport, TernaryConfig, TernaryMatrix


def ternarize(W: ArrayLike, C: ArrayLike, config: TernaryConfig = TernaryConfig()) -> TernaryMatrix:
    """Ternarize one weight matrix by PT²-LLM.

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
    columns inside a block changes none of this; they ascend. Weights of dead inputs (zero diagonal
    of C) meet only zeros and are set to 0 first. A scale or shift below the least step of what is stored
    (6e-8 for float16) becomes 0, which the errors in the report show.
    """
    W = checks.matrix(W, "W")
    C = checks.gram(C, W.shape[1])
    columns = W.shape[1]
    W = np.where(np.diag(C) == 0, 0.0, W)

    order = _fixed_order(C, config)
    Hinv: Floats | None = None
    damping = 0.0
    if config.compensation or config.aga == "conditional":
        Hinv, damping = invert_damped(C, config.damping)

    fits: list[_BlockFit] = []
    row = row_factor(W) if config.grid == "int8" else None
    scale, shift = _Stored("scale", row), _Stored("shift", row)
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
        cost = C_BB
        if config.aga == "conditional" and Hinv is not None:
            cost = linalg.cho_solve(linalg.cho_factor(Hinv[np.ix_(B, B)]), np.eye(B.size))

        fit = _fit_block(W_B, C_BB, cost, config)
        W_hat = scale.add(fit.alpha) * fit.T + shift.add(fit.mu)

        fits.append(fit)
        blocks.append(rest[B])
        W_rest = W_rest[:, R]
        if R.size and Hinv is not None:
            if config.compensation:
                W_rest = compensate(W_rest, W_B - W_hat, Hinv[np.ix_(B, B)], Hinv[np.ix_(B, R)])
            Hinv = eliminate(Hinv, B, R)
        rest = rest[R]

    result = TernaryMatrix(
        trits=np.hstack([fit.T for fit in fits]),
        scale=scale.grid(),
        shift=shift.grid(),
        permutation=np.concatenate(blocks),
        block_size=config.block_size,
    )
    return replace(result, report=_report(W, C, result, fits, damping))


@dataclass
class _BlockFit:
    """One block after each stage."""

    alpha: Floats
    mu: Floats
    T: Trits
    weight_errors: list[float]  # at the start and after every half-step of ITF
    aligned_weight_error: float = 0.0
    output_errors: dict[str, float] = field(default_factory=dict)


def _fit_block(W_B: Floats, C_BB: Floats, cost: Floats, config: TernaryConfig) -> _BlockFit:
    """Algorithm 1 on one block; `cost` is the matrix that AGA minimizes with."""
    if config.start == "twn":
        alpha, T = symmetric_ternarize(W_B)
        mu = np.zeros_like(alpha)
    else:
        alpha, mu, T = ternary_init(W_B)
    fit = _BlockFit(alpha, mu, T, [weight_error(W_B, alpha, mu, T)])
    fit.output_errors["init"] = output_error(W_B, alpha * T + mu, C_BB)
    if config.itf:
        fit.alpha, fit.mu, fit.T, fit.weight_errors = iterative_ternary_fitting(
            W_B, config.max_iterations, (alpha, mu, T)
        )
    fit.output_errors["itf"] = output_error(W_B, fit.alpha * fit.T + fit.mu, C_BB)
    if config.aga in ("exact", "conditional"):
        fit.alpha, fit.mu = align_grid(W_B, fit.T, cost)
    elif config.aga == "printed":
        fit.alpha, fit.mu = align_grid_printed(W_B, fit.T, C_BB)
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


class _Stored:
    """alpha or mu of the blocks so far, as a checkpoint holds it: float16, or coded with factors of rows."""

    def __init__(self, name: str, row: np.ndarray | None) -> None:
        self.name = name
        self.row = row
        self.columns: list[np.ndarray] = []
        self.factors: list[np.ndarray] = []

    def add(self, value: Floats) -> np.ndarray:
        """Take in a block (n, 1), and give its values as they are read back, in float32."""
        if self.row is None:
            stored = self._float16(value)
            self.columns.append(stored)
            return stored.astype(np.float32)
        coded = encode(value, self.row)
        self.columns.append(coded.codes)
        self.factors.append(coded.block)
        return coded.decode()

    def grid(self) -> Any:
        """All blocks."""
        columns = np.hstack(self.columns)
        return columns if self.row is None else CodedGrid(columns, self.row, np.hstack(self.factors))

    def _float16(self, value: Floats) -> np.ndarray:
        with np.errstate(over="ignore"):
            stored = value.astype(np.float16)
        if not np.isfinite(stored).all():
            row = int(np.argmin(np.isfinite(stored[:, 0])))
            raise ValueError(
                f"the {self.name} of row {row}, block {len(self.columns)} is {value[row, 0]:.6g}, "
                "beyond what float16 holds"
            )
        return stored


def _report(W: Floats, C: Floats, result: TernaryMatrix, fits: list[_BlockFit], damping: float) -> FitReport:
    def share(value: float, total: float) -> float:
        return value / total if total > 0 else 0.0

    steps = max(len(f.weight_errors) for f in fits)
    curve = [sum(f.weight_errors[min(s, len(f.weight_errors) - 1)] for f in fits) for s in range(steps)]
    norm = float(np.square(W).sum())
    power = output_error(W, np.zeros_like(W), C)
    return FitReport(
        damping=damping,
        weight_power=norm,
        output_power=power,
        iterations=(steps - 1) // 2,  # a block that hit the limit ends with one more grid
        weight_errors=tuple(share(e, norm) for e in curve),
        aligned_weight_error=share(sum(f.aligned_weight_error for f in fits), norm),
        output_errors={
            stage: share(sum(f.output_errors[stage] for f in fits), power) for stage in ("init", "itf", "aga")
        },
        variance_before=block_variance(W, result.block_size),
        variance_after=block_variance(permute(W, result.permutation), result.block_size),
        relative_output_error=share(output_error(W, result.dequantize(), C), power),
    )
