"""Ternarize one weight matrix from start to end on the device; see `reference.ternarize`.

W and the inverse of H are updated in place. Finished columns are set to zero, and removed once they reach
`DONE_SHARE` of all (`_Remaining`). The host knows all shapes, so it queues the whole loop without waiting for
the device, and checks for errors (a failed factorization, a scale beyond float16) once at the end. After that
comes the refinement, if any, which waits once a round.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu import checks
from gpu.aga import aligned_grid, quadratic_form
from gpu.atq import residual, squared_norm
from gpu.descent import descended
from gpu.device import Array, cholesky, is_factor, subtract_product, xp
from gpu.gptq import damped_inverse, halved
from gpu.grids import coded, require_coded, row_factor
from gpu.joint import damp_alive, spread_grid
from gpu.kernels.feedforward import feed_rows
from gpu.kernels.fitting import fit_rows
from gpu.refine import refined
from gpu.ssr import block_variance, most_similar
from gpu.twin import twin
from reference.types import FitReport, TernaryConfig, TernaryMatrix

STAGES = ("init", "itf", "aga")

# Remove finished columns at this share of all: from there on, the copy costs less than products with zeros.
DONE_SHARE = 0.25


@twin
def ternarize(W: Array, C: Array, config: TernaryConfig = TernaryConfig()) -> TernaryMatrix:
    """The result holds device arrays. W may be float32 or float64; compensation is float64 for both.
    Eq. 13 as printed raises ValueError; a block without a Cholesky factor raises LinAlgError.
    """
    if config.aga == "printed":
        raise ValueError("Eq. 13 as printed is only in the reference backend")
    W = checks.matrix(W, "W")
    C = checks.gram(C, W.shape[1])
    n, m = W.shape
    W = xp.where(xp.diagonal(C) == 0, 0, W).astype(W.dtype, copy=False)
    blocks = -(-m // config.block_size)

    order = _fixed_order(C, config)
    Hinv: Array | None = None
    damping = 0.0
    if config.compensation or config.aga == "conditional" or config.feed_forward:
        Hinv, damping = damped_inverse(C, config.damping)
    elif config.refinement != "none":
        damping = config.damping

    remaining = _Remaining(W, Hinv)
    del Hinv  # `_Remaining` owns it, updates it, and frees it when it removes columns
    trits = xp.empty((n, m), np.int8)
    grids = xp.empty((2, n, blocks))  # alpha and mu as computed
    W_hat = xp.empty((n, m), np.float32)
    permutation = xp.empty(m, np.intp)
    factors: list[tuple[Array, Array]] = []  # Cholesky factor and matrix diagonal of every block
    row = row_factor(W) if config.grid == "int8" else None
    figures = _Figures(config, blocks)
    for b in range(blocks):
        block = slice(b * config.block_size, min((b + 1) * config.block_size, m))
        width = block.stop - block.start
        B = remaining.most_similar(width) if order is None else remaining.places(order[block])
        columns = remaining.columns[B]
        W_B = remaining.W[:, B]
        C_BB = C[columns[:, None], columns]
        cost, L = C_BB, None
        if remaining.Hinv is not None:
            Hinv_B = remaining.Hinv[B]
            Hinv_BB = Hinv_B[:, B]
            L = cholesky(Hinv_BB)
            factors.append((L, xp.diagonal(Hinv_BB)))
            whitening, half = halved(L, Hinv_B)
            if config.aga == "conditional":
                cost = whitening.T @ whitening

        grid, T = _fit_block(W_B, C_BB, cost, L, config, figures, b)
        grids[:, :, b : b + 1] = grid
        alpha, mu = _read_back(grid, row)
        trits[:, block], permutation[block] = T, columns
        with np.errstate(invalid="ignore"):  # `_stored` refuses an infinite scale at the end
            W_hat_B = alpha * T + mu
        W_hat[:, columns] = W_hat_B

        if b + 1 < blocks:
            if remaining.Hinv is not None:
                if config.compensation:
                    subtract_product(remaining.W, (W_B - W_hat_B) @ whitening.T, half)
                subtract_product(remaining.Hinv, half.T, half)
            remaining.take(B)

    if not _all_are_factors(factors):
        raise np.linalg.LinAlgError(f"the inverse of H has no Cholesky factor, with damping {damping:g}")
    scale, shift = _stored(grids, row)
    errors: list[float] = []
    if config.refinement != "none":
        del remaining  # and the inverse of H with it
        trits, (scale, shift), W_hat[:, permutation], errors = _refined(
            W, C, trits, grids, permutation, damping, config, row
        )
    return TernaryMatrix(
        trits=trits,
        scale=scale,
        shift=None if config.symmetric else shift,
        permutation=permutation,
        block_size=config.block_size,
        report=figures.report(W, W_hat, C, permutation, damping, errors),
    )


def _refined(
    W: Array,
    C: Array,
    trits: Array,
    grids: Array,
    permutation: Array,
    damping: float,
    config: TernaryConfig,
    row: Array | None,
) -> tuple[Array, tuple[Any, Any], Array, list[float]]:
    """Refine whole rows from the grids as computed, (2, n, blocks).

    Returns
    -------
    trits : (n, m) int8
    stored : alpha and mu of all blocks, in the stored type
    W_hat : (n, m) float32
        Columns in quantization order, like those of the trits.
    errors : list of float
        As shares of the power of W.
    """
    k, descends = config.block_size, config.refinement == "descent"
    if config.reorder == "none":
        H = C.copy()
    else:
        W, H = W[:, permutation], C[permutation[:, None], permutation]
    H = damp_alive(H, damping)
    W = W.astype(np.float64, copy=False)
    rounds = config.rounds if descends else 0
    alpha, mu, trits, errors = refined(W, trits, grids[0], grids[1], H, k, rounds, config.symmetric)
    grids = xp.stack([alpha, mu])
    stored = _stored(grids, row)
    alpha, mu = _read_back(grids, row)
    if descends:
        trits = descended(W, trits, alpha.astype(np.float64), mu.astype(np.float64), H, k)
    W_hat = spread_grid(alpha, W.shape[1], k) * trits + spread_grid(mu, W.shape[1], k)
    power = float(quadratic_form(W, H))
    return trits, stored, W_hat, [error / power if power > 0 else 0.0 for error in errors]


class _Remaining:
    """The remaining columns of W, compensated, and the inverse of H over them.

    Finished columns stay as zeros, until several are removed together.

    Attributes
    ----------
    W : (n, r) float64
        Among thousands of columns, some are almost as similar as the last one chosen. In float32, the choice
        could differ from the reference's, and with it all later results.
    Hinv : (r, r) float64, or None
    columns : (r,) array of int
        Indices of the remaining columns in the whole matrix, ascending.
    """

    def __init__(self, W: Array, Hinv: Array | None) -> None:
        self.W = W.astype(np.float64)
        self.Hinv = Hinv
        self.columns = xp.arange(W.shape[1])
        self._waiting = xp.ones(W.shape[1], bool)
        self._done = 0

    def most_similar(self, k: int) -> Array:
        """Choose k columns by Eq. 16; return their positions."""
        return most_similar(self.W, self._waiting, k)

    def places(self, columns: Array) -> Array:
        """Return the positions of columns of the whole matrix, ascending."""
        return xp.searchsorted(self.columns, xp.sort(columns))

    def take(self, B: Array) -> None:
        """Mark the columns at these positions as finished."""
        self._waiting[B] = False
        self._done += len(B)
        held = len(self.columns)
        if self._done < DONE_SHARE * held:
            self.W[:, B] = 0
            if self.Hinv is not None:
                self.Hinv[:, B] = 0  # their rows are never read again
            return
        # `flatnonzero` would make the host wait for its length; a sort does not.
        kept = xp.sort(xp.where(self._waiting, xp.arange(held), held))[: held - self._done]
        self.W = xp.take(self.W, kept, axis=1)
        if self.Hinv is not None:
            self.Hinv = self.Hinv[kept[:, None], kept]
        self.columns = self.columns[kept]
        self._waiting, self._done = xp.ones(len(kept), bool), 0


def _all_are_factors(factors: list[tuple[Array, Array]]) -> bool:
    """Whether `is_factor` holds for all; waits for the device. Only the last block may differ in width."""
    checked = [
        is_factor(*(xp.stack(part) for part in zip(*some, strict=True)))
        for some in (factors[:-1], factors[-1:])
        if some
    ]
    return all(map(bool, checked))


def _fit_block(
    W_B: Array,
    C_BB: Array,
    cost: Array,
    L: Array | None,
    config: TernaryConfig,
    figures: _Figures,
    b: int,
) -> tuple[Array, Array]:
    """Run Algorithm 1 on one block, and feed its trits forward; return alpha and mu (2, n, 1), and the trits.

    `cost` is the matrix of the quadratic form that AGA minimizes, and L the Cholesky factor of H⁻¹_BB.
    """
    limit = config.max_iterations if config.itf else 0
    twn = config.symmetric or config.start == "twn"
    fitted, T0, T, errors, steps = fit_rows(W_B, limit, twn=twn, symmetric=config.symmetric)
    alpha, mu = fitted[:, 2:3], fitted[:, 3:4]
    init = residual(W_B, fitted[:, 0:1], fitted[:, 1:2], T0)
    aligned = itf = residual(W_B, alpha, mu, T)
    if config.aga != "none":
        alpha, mu = aligned_grid(W_B, T, cost, config.symmetric)
        aligned = residual(W_B, alpha, mu, T)
    if config.feed_forward and L is not None:
        T = feed_rows(W_B, alpha, mu, L)
        if config.aga != "none":
            alpha, mu = aligned_grid(W_B, T, cost, config.symmetric)
        aligned = residual(W_B, alpha, mu, T)
    # One product serves all three stages.
    E = xp.concatenate([init, itf, aligned])
    # Sum each row first: a single sum over a whole stage would run on one SM.
    of_rows = ((E @ C_BB) * E).sum(axis=1)
    figures.output_errors[b] = of_rows.reshape(len(STAGES), -1).sum(axis=1)
    figures.aligned += squared_norm(aligned)
    errors.sum(axis=1, out=figures.curve[b])
    figures.steps = xp.maximum(figures.steps, steps.max())
    return xp.stack([alpha, mu]), T


class _Figures:
    """Accumulates the figures of the report on the device."""

    def __init__(self, config: TernaryConfig, blocks: int) -> None:
        self.block_size = config.block_size
        limit = config.max_iterations if config.itf else 0
        self.curve = xp.zeros((blocks, 2 * limit + 2))
        self.steps = xp.zeros((), np.int32)
        self.aligned = xp.zeros(())
        self.output_errors = xp.zeros((blocks, len(STAGES)))

    def report(
        self, W: Array, W_hat: Array, C: Array, permutation: Array, damping: float, errors: list[float]
    ) -> FitReport:
        """Return the report; waits for the device."""

        def share(value: Array, total: float) -> float:
            return float(value) / total if total > 0 else 0.0

        norm = float(squared_norm(W))
        W64 = W.astype(np.float64, copy=False)
        power = float(quadratic_form(W64, C))
        steps = int(self.steps)
        return FitReport(
            damping=damping,
            weight_power=norm,
            output_power=power,
            iterations=(steps - 1) // 2,
            weight_errors=tuple(share(error, norm) for error in self.curve.sum(axis=0)[:steps].tolist()),
            aligned_weight_error=share(self.aligned, norm),
            output_errors={
                stage: share(error, power)
                for stage, error in zip(STAGES, self.output_errors.sum(axis=0).tolist(), strict=True)
            },
            variance_before=block_variance(W, self.block_size),
            variance_after=block_variance(W[:, permutation], self.block_size),
            relative_output_error=share(quadratic_form(W64 - W_hat, C), power),
            refinement_errors=tuple(errors),
        )


def _fixed_order(C: Array, config: TernaryConfig) -> Array | None:
    """Return the order of the columns, or None for SSR, which chooses columns block by block."""
    if config.reorder == "ssr":
        return None
    if config.reorder == "hessian":
        return xp.argsort(-xp.diagonal(C), kind="stable")
    if config.reorder == "random":
        return xp.asarray(np.random.default_rng(config.seed).permutation(C.shape[0]))
    return xp.arange(C.shape[0])


def _read_back(grid: Array, row: Array | None) -> tuple[Array, Array]:
    """Round alpha and mu of one or all blocks, (2, n, blocks), to the stored type; return them in float32."""
    if row is None:
        alpha, mu = _float16(grid).astype(np.float32)
        return alpha, mu
    return coded(grid[0], row).decode(), coded(grid[1], row).decode()


def _stored(grids: Array, row: Array | None) -> tuple[Any, Any]:
    """Return alpha and mu of all blocks, (2, n, blocks), in the stored type; refuse values out of range."""
    if row is None:
        stored = _float16(grids)
        _require_float16(grids, stored)
        return stored[0], stored[1]
    scale, shift = coded(grids[0], row), coded(grids[1], row)
    require_coded(scale, grids[0], row)
    require_coded(shift, grids[1], row)
    return scale, shift


def _float16(value: Array) -> Array:
    """Round to float16; values beyond its range become infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return value.astype(np.float16)


def _require_float16(grids: Array, stored: Array) -> None:
    """Refuse scales and shifts beyond the range of float16; the error names the first, in order of blocks."""
    finite = xp.isfinite(stored)
    if finite.all():
        return
    block, which, row = (int(index[0]) for index in xp.nonzero(~finite.transpose(2, 0, 1)))
    value = float(grids[which, row, block])
    name = ("scale", "shift")[which]
    raise ValueError(f"the {name} of row {row}, block {block} is {value:.6g}, beyond what float16 holds")
