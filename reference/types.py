"""What passes between the stages: the settings, a ternarized matrix, and how it was fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

STARTS = ("asymmetric", "twn")
SHIFTS = ("free", "none")
REORDERINGS = ("none", "random", "hessian", "ssr")
ALIGNMENTS = ("none", "exact", "printed", "conditional")
REFINEMENTS = ("none", "grid", "descent")
GRIDS = ("float16", "int8")

# Codes of a `CodedGrid` are symmetric about 0.
CODE_LIMIT = 127


@dataclass(frozen=True)
class TernaryConfig:
    """Settings of `ternarize`; the defaults are the paper's where it names one, `BEST` the best known.

    It names no damping, for which GPTQ's is taken, no limit of rounds, and not what alpha and mu are stored
    in. ``start="twn"``, ``compensation=False`` and the alignments "printed" and "conditional" are for
    comparison.

    Attributes
    ----------
    block_size : int
        Columns that share a scale and a shift in each row (k).
    start : {"asymmetric", "twn"}
        First grid and trits of a block: Eq. 4-5, or Eq. 1-3 with mu = 0. Without a shift both are Eq. 1-3.
    reorder : {"none", "random", "hessian", "ssr"}
        Order of the columns: as they are, shuffled, by falling diagonal of C, or Eq. 16.
    itf : bool
        Whether iterative ternary fitting runs (Eq. 9-10).
    aga : {"none", "exact", "printed", "conditional"}
        Grid alignment: none, Eq. 12, Eq. 13 as printed, or Eq. 12 with (H⁻¹_BB)⁻¹ in place of
        C_BB, which is the cost a block causes once its error has been compensated, if it is.
    compensation : bool
        Whether the error of a block is moved into the remaining columns.
    damping : float
        Share of the mean of the diagonal of C added to the diagonal.
    max_iterations : int
        Most rounds of ITF.
    seed : int
        Seed of the random order.
    grid : {"float16", "int8"}
        What alpha and mu are stored in: float16, or 8-bit codes with factors of rows and blocks
        (`CodedGrid`). The paper does not say.
    feed_forward : bool
        Whether the trits of an aligned block are rounded once more, column by column with each error moved
        into the rest of the block, and the grid is aligned again.
    refinement : {"none", "grid", "descent"}
        What follows the last block: nothing, the joint grid of whole rows, or rounds of joint grid and
        coordinate descent on the trits.
    rounds : int
        Most rounds of the refinement.
    shift : {"free", "none"}
        Whether mu is fitted, or 0 throughout and not stored: symmetric ternarization, for runtimes that hold
        ``alpha * t`` alone.
    """

    block_size: int = 128
    start: str = "asymmetric"
    reorder: str = "ssr"
    itf: bool = True
    aga: str = "exact"
    compensation: bool = True
    damping: float = 0.01
    max_iterations: int = 100
    seed: int = 0
    grid: str = "float16"
    feed_forward: bool = False
    refinement: str = "none"
    rounds: int = 4
    shift: str = "free"

    def __post_init__(self) -> None:
        choices = (
            ("start", STARTS),
            ("reorder", REORDERINGS),
            ("aga", ALIGNMENTS),
            ("refinement", REFINEMENTS),
            ("grid", GRIDS),
            ("shift", SHIFTS),
        )
        for name, known in choices:
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("block_size", "max_iterations", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"damping must be finite and not negative, got {self.damping}")
        if self.symmetric and self.aga == "printed":
            raise ValueError("aga printed (Eq. 13) fits a shift, and shift none has none; change one")

    @property
    def symmetric(self) -> bool:
        """Whether mu is 0 throughout."""
        return self.shift == "none"


# The best known at these bits: no column order, more damping, and every step that the paper does not have.
BEST = TernaryConfig(reorder="none", aga="conditional", feed_forward=True, refinement="descent", damping=0.3)


@dataclass(frozen=True)
class FitReport:
    """How one matrix was fitted; the figures behind Fig. 3.

    Errors per stage are sums over blocks, each block against the weights it was fitted to (those
    compensated for the blocks before it), before alpha and mu are rounded to what is stored. W here has the
    weights of dead inputs at 0.

    Attributes
    ----------
    damping : float
        Damping used; larger than configured if the factorization asked for it, 0 if none was needed.
    weight_power, output_power : float
        ‖W‖² and tr(W C Wᵀ), which the errors are shares of (0 where the power is 0).
    iterations : int
        Most rounds of ITF that a block took; 0 without ITF.
    weight_errors : tuple of float
        E_w / ‖W‖² at the start and after every half-step of ITF; blocks that stopped earlier
        count with their last value.
    aligned_weight_error : float
        E_w / ‖W‖² after AGA.
    output_errors : dict of str to float
        E_x / tr(W C Wᵀ) after "init", "itf" and "aga", with C_BB.
    refinement_errors : tuple of float
        tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ) after the last block and after every step of the refinement, with
        H of `reference.joint.damped_objective`; empty without refinement.
    variance_before, variance_after : float
        Mean variance within blocks of W in its own order, and in quantization order.
    relative_output_error : float
        E_x / tr(W C Wᵀ) of the whole matrix as stored.
    """

    damping: float
    weight_power: float
    output_power: float
    iterations: int
    weight_errors: tuple[float, ...]
    aligned_weight_error: float
    output_errors: dict[str, float]
    variance_before: float
    variance_after: float
    relative_output_error: float
    refinement_errors: tuple[float, ...] = ()


@dataclass(frozen=True)
class CodedGrid:
    """alpha or mu of every block of every row in 8 bits: ``float32(row) * float32(block) * code``.

    Attributes
    ----------
    codes : (n, blocks) int8
        At most `CODE_LIMIT` in magnitude.
    row : (n, 1) float16
        Factor of a row, shared by alpha and mu.
    block : (1, blocks) float16
        Factor of a block.
    """

    codes: Any
    row: Any
    block: Any

    def decode(self) -> Any:
        """The values, (n, blocks) float32: products in the order above, each rounded."""
        return self.row.astype(np.float32) * self.block.astype(np.float32) * self.codes


@dataclass(frozen=True)
class TernaryMatrix:
    """A weight matrix as a checkpoint holds it.

    Attributes
    ----------
    trits : (n, m) int8
        -1, 0 and +1; columns in quantization order.
    scale : (n, blocks) float16, or CodedGrid
        alpha of every block of `block_size` columns; the last block may have fewer.
    shift : (n, blocks) float16, or CodedGrid, or None
        mu of every block; None if all are 0 and not stored.
    permutation : (m,) intp
        ``trits[:, j]`` belongs to column ``permutation[j]`` of the original matrix.
    block_size : int
        Columns in a block.
    report : FitReport, optional
        How it was fitted; None for a matrix that was read back.
    """

    trits: Any
    scale: Any
    shift: Any
    permutation: Any
    block_size: int
    report: FitReport | None = None

    def dequantize(self) -> Any:
        """``float32(alpha) * t + float32(mu)``, as (n, m) float32 in the original column order.

        Without a shift mu is +0, so no weight is -0.
        """
        n, m = self.trits.shape

        def every_column(grid: Any) -> Any:
            blocks = grid.decode() if isinstance(grid, CodedGrid) else grid.astype(np.float32)
            # These NumPy functions hand device arrays on to their own library.
            spread = np.broadcast_to(blocks[:, :, None], (*blocks.shape, self.block_size))
            return spread.reshape(n, -1)[:, :m]

        mu = np.float32(0) if self.shift is None else every_column(self.shift)
        ordered = every_column(self.scale) * self.trits + mu
        W_hat = np.empty_like(ordered)
        W_hat[:, self.permutation] = ordered
        return W_hat
