"""Two implementations of the paper's equations, both independent of `reference`.

`Exact` uses rational numbers (`fractions.Fraction` in NumPy object arrays), so its answers are exact.
`Dense` uses float64, with dense least squares and direct sums where `reference` uses closed forms and
updates. Both record the distance of every rounding and choice from its threshold, so that answers that
rounding could change are rejected.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Grid = tuple[Array, Array]

HALF = Fraction(1, 2)
THRESHOLD = Fraction(3, 4)
# Eigenvalues of Eq. 12's system count as zero below 1e-12; these are their square roots.
LEAST_SQUARES_CUTOFF = 1e-6
LARGEST_CODE = 127


def rational(values: Any) -> Array:
    """Convert `values` to an object array of `Fraction`; floats are converted exactly."""
    array = np.asarray(values)
    result = np.empty(array.shape, dtype=object)
    for index, value in np.ndenumerate(array):
        result[index] = value if isinstance(value, Fraction) else Fraction(value.item())
    return result


class Arithmetic(ABC):
    """Base of both implementations; records how close decisions are to their thresholds."""

    def __init__(self) -> None:
        self.noted: list[Array] = []

    def note(self, distances: Any) -> None:
        """Record the distances of decisions from their thresholds; 0 is a tie."""
        self.noted.append(np.asarray(distances, dtype=np.float64))

    def ternary_init(self, W: Array) -> tuple[Array, Array, Array]:
        """Eq. 4-5: the row means, and Eq. 1-3 on the residual."""
        mu = self.row_means(W)
        alpha, T = self.symmetric(W - mu)
        return alpha, mu, T

    def stored(self, value: Array) -> Array:
        """Round `value` to float16, and record the distance from the rounding thresholds."""
        exact = value.astype(np.float64)
        rounded = exact.astype(np.float16)
        middles = [
            (rounded.astype(np.float64) + np.nextafter(rounded, np.float16(end)).astype(np.float64)) / 2
            for end in (-np.inf, np.inf)
        ]
        gap = np.minimum(*(np.abs(exact - middle) for middle in middles))
        self.note(gap / np.maximum(np.abs(exact), 2.0**-24))
        return rounded

    def row_factor(self, W: Array) -> Array:
        """Compute the root mean square of every row as float16."""
        return self.stored(self.root_mean_squares(W))

    def coded(self, value: Array, row: Array) -> Grid:
        """Encode the values (n, 1) of a block, given the row factors: 8-bit codes, and a float16 factor."""
        shares = np.array([[v / r if r else v * 0] for v, r in zip(value[:, 0], row[:, 0], strict=True)])
        block = self.stored(np.abs(shares).max(keepdims=True) / LARGEST_CODE)
        if not block[0, 0]:
            return np.zeros(shares.shape, dtype=np.int8), block
        steps = shares / self.numbers(block)
        self.note(np.abs((np.abs(steps) % 1 - HALF).astype(np.float64)))
        codes = [[max(-LARGEST_CODE, min(LARGEST_CODE, round(step)))] for step in steps[:, 0]]
        return np.array(codes, dtype=np.int8), block

    @abstractmethod
    def numbers(self, values: Any) -> Array:
        """Convert values to an array of this arithmetic's numbers."""

    @abstractmethod
    def root_mean_squares(self, W: Array) -> Array:
        """Compute the root mean square of every row, (n, 1)."""

    @abstractmethod
    def row_means(self, W: Array) -> Array:
        """Compute the mean of every row, (n, 1)."""

    @abstractmethod
    def symmetric(self, W: Array) -> tuple[Array, Array]:
        """Eq. 1-3: alpha and T."""


class Exact(Arithmetic):
    """Rational arithmetic, row by row and entry by entry."""

    def numbers(self, values: Any) -> Array:
        return rational(values)

    def row_means(self, W: Array) -> Array:
        return _columns([sum(w) / Fraction(len(w)) for w in W])

    def root_mean_squares(self, W: Array) -> Array:
        """To 60 digits."""
        roots = []
        for w in W:
            square = w @ w / Fraction(len(w))
            digits = math.isqrt(square.numerator * square.denominator * 10**120)
            roots.append(Fraction(digits, square.denominator * 10**60))
        return _columns(roots)

    def symmetric(self, W: Array) -> tuple[Array, Array]:
        """Eq. 1-3 as they stand."""
        alphas, T = [], np.zeros(W.shape, dtype=np.int8)
        distances = np.zeros(W.shape)
        for i, w in enumerate(W):
            delta = THRESHOLD * sum(abs(x) for x in w) / len(w)
            T[i] = [0 if abs(x) <= delta else (1 if x > 0 else -1) for x in w]
            kept = [abs(x) for x in w if abs(x) > delta]
            alphas.append(sum(kept) / Fraction(len(kept)) if kept else Fraction(0))
            distances[i] = [float(abs(abs(x) - delta) / delta) if delta else 0.0 for x in w]
        self.note(distances)
        return _columns(alphas), T

    def grid(self, W: Array, T: Array, symmetric: bool = False) -> Grid:
        """Solve the normal equations of Eq. 8; equal trits determine no scale (result: 0 and the mean).

        With mu = 0, find the lowest point of the error as a function of alpha.
        """
        if symmetric:
            scales = _best_scales(W, T, rational(np.eye(W.shape[1])))
            return scales, scales * 0
        alphas, mus = [], []
        for w, t in zip(W, T.astype(int), strict=True):
            if len(set(t)) == 1:
                alpha, mu = Fraction(0), sum(w) / Fraction(len(w))
            else:
                alpha, mu = _least_norm(
                    Fraction(int(t @ t)), Fraction(int(t.sum())), Fraction(len(t)), w @ t, sum(w)
                )
            alphas.append(alpha)
            mus.append(mu)
        return _columns(alphas), _columns(mus)

    def round(self, W: Array, alpha: Array, mu: Array) -> Array:
        """Eq. 10: the nearest of the three grid values, 0 at a tie."""
        T = np.zeros(W.shape, dtype=np.int8)
        distances = np.ones(W.shape)
        for (i, j), w in np.ndenumerate(W):
            a, b = alpha[i, 0], mu[i, 0]
            T[i, j] = min((0, 1, -1), key=lambda t: abs(w - a * t - b))
            if a:
                distances[i, j] = float(min(abs(abs((w - b) / a) - HALF), Fraction(1)))
        self.note(distances)
        return T

    def align(self, W: Array, T: Array, C: Array, symmetric: bool = False) -> Grid:
        """Eq. 12, the correction of Eq. 9's grid by Cramer's rule or, if singular, of least norm.

        With mu = 0, find the lowest point of the error as a function of alpha's correction.
        """
        alpha, mu = self.grid(W, T, symmetric)
        if symmetric:
            return alpha + _best_scales(W - alpha * T, T, C), mu
        for i, t in enumerate(rational(T)):
            residual = W[i] - alpha[i, 0] * t - mu[i, 0]
            one_C = C.sum(axis=0)
            d_alpha, d_mu = _least_norm(t @ C @ t, one_C @ t, one_C.sum(), residual @ C @ t, residual @ one_C)
            alpha[i, 0] += d_alpha
            mu[i, 0] += d_mu
        return alpha, mu

    def align_printed(self, W: Array, T: Array, C: Array) -> Grid:
        """Eq. 13 as printed; equal trits or a zero denominator keep the grid of Eq. 9."""
        alpha, mu = self.grid(W, T)
        s = C.sum(axis=1)
        for i, (w, t) in enumerate(zip(W, rational(T), strict=True)):
            d, v, q, r, p = sum(s), t @ s, (t * t) @ s, w @ s, (w * t) @ s
            denominator = d * q - v * v
            if denominator and len(set(t)) > 1:
                alpha[i, 0] = (d * p - v * r) / denominator
                mu[i, 0] = (q * r - v * p) / denominator
        return alpha, mu

    def weight_error(self, E: Array) -> Any:
        return sum(x * x for x in E.flat)

    def output_error(self, E: Array, C: Array) -> Any:
        return sum(self.row_errors(E, C))

    def row_errors(self, E: Array, C: Array) -> Array:
        """Compute e C eᵀ of every row e, (n,)."""
        return np.array([e @ C @ e for e in E], dtype=object)

    def similarities(self, W: Array) -> list[Any]:
        """Compute a key per column that orders like its cosine with the mean; None for a zero column.

        The key is sign(c) c² for the cosine c, times a factor that all columns share: it needs no root.
        """
        mean = W.sum(axis=1) / Fraction(W.shape[1])
        dots = [w @ mean for w in W.T]
        return [d * abs(d) / (w @ w) if any(w) else None for w, d in zip(W.T, dots, strict=True)]

    def cosines(self, W: Array) -> Array:
        """Eq. 15, with the root to 60 digits, then rounded once."""
        result = np.zeros((W.shape[1], W.shape[1]))
        for i, a in enumerate(W.T):
            for j, b in enumerate(W.T):
                square = (a @ a) * (b @ b)
                if square:
                    root = Fraction(math.isqrt(square.numerator * square.denominator * 10**120), 10**60)
                    result[i, j] = float((a @ b) * square.denominator / root)
        return result

    def solve(self, A: Array, B: Array) -> Array:
        """A⁻¹ B by elimination without rounding."""
        work = np.hstack([A, B]).astype(object)
        size = A.shape[0]
        for j in range(size):
            pivot = next(i for i in range(j, size) if work[i, j])
            work[[j, pivot]] = work[[pivot, j]]
            work[j] = work[j] / work[j, j]
            for i in range(size):
                if i != j:
                    work[i] = work[i] - work[i, j] * work[j]
        return work[:, size:]

    def positive_definite(self, H: Array) -> bool:
        """Whether all pivots of elimination are positive."""
        work = H.copy()
        for j in range(len(work)):
            if work[j, j] <= 0:
                return False
            for i in range(j + 1, len(work)):
                work[i] = work[i] - work[i, j] / work[j, j] * work[j]
        return True

    def gram(self, X: Array) -> Array:
        return X.T @ X

    def product(self, A: Array, B: Array) -> Array:
        return A @ B


class Dense(Arithmetic):
    """float64, by least squares and direct sums."""

    _rooted: tuple[Array, Array] | None = None

    def numbers(self, values: Any) -> Array:
        return np.asarray(values, dtype=np.float64)

    def row_means(self, W: Array) -> Array:
        return np.array([[math.fsum(w) / len(w)] for w in W])

    def root_mean_squares(self, W: Array) -> Array:
        return np.array([[math.sqrt(math.fsum(w * w) / len(w))] for w in W])

    def symmetric(self, W: Array) -> tuple[Array, Array]:
        """Eq. 1-3 with sums that are rounded once."""
        delta = np.array([[0.75 * math.fsum(abs(w)) / len(w)] for w in W])
        T = np.where(abs(W) > delta, np.sign(W), 0).astype(np.int8)
        kept = np.maximum(np.abs(T).sum(axis=1), 1)
        alpha = np.array([math.fsum(abs(w[t != 0])) for w, t in zip(W, T, strict=True)]) / kept
        # A row of zeros, such as a single centred column, needs no rounding.
        self.note(np.where(delta == 0, 1.0, abs(abs(W) / np.where(delta == 0, 1.0, delta) - 1)))
        return alpha[:, None], T

    def grid(self, W: Array, T: Array, symmetric: bool = False) -> Grid:
        """Eq. 8 as a least squares problem in [t, 1], or [t]; equal trits determine no scale in the first."""
        alpha, mu = self._fit(W, T, np.eye(W.shape[1]), symmetric)
        if symmetric:
            return alpha, mu
        equal = (T == T[:, :1]).all(axis=1, keepdims=True)
        return np.where(equal, 0.0, alpha), np.where(equal, self.row_means(W), mu)

    def round(self, W: Array, alpha: Array, mu: Array) -> Array:
        """Eq. 10: argmin over the three values of the grid; the first, 0, wins a tie."""
        values = np.array([0, 1, -1])
        errors = np.stack([abs(W - (alpha * t + mu)) for t in values])
        self.note(np.where(alpha == 0, 1.0, abs(abs(W - mu) / np.where(alpha == 0, 1.0, abs(alpha)) - 0.5)))
        return values[errors.argmin(axis=0)].astype(np.int8)

    def align(self, W: Array, T: Array, C: Array, symmetric: bool = False) -> Grid:
        """Eq. 12 as a least squares problem: minimize the norm of (w - alpha t - mu 1) C^½."""
        alpha, mu = self.grid(W, T, symmetric)
        d_alpha, d_mu = self._fit(W - alpha * T - mu, T, self.root(C), symmetric)
        return alpha + d_alpha, mu + d_mu

    def _fit(self, W: Array, T: Array, root: Array, symmetric: bool) -> Grid:
        result = np.zeros((W.shape[0], 2))
        for i, (w, t) in enumerate(zip(W, T.astype(np.float64), strict=True)):
            design = root.T @ np.stack([t] if symmetric else [t, np.ones_like(t)], axis=1)
            result[i, : design.shape[1]] = np.linalg.lstsq(design, root.T @ w, rcond=LEAST_SQUARES_CUTOFF)[0]
        return result[:, :1], result[:, 1:]

    def align_printed(self, W: Array, T: Array, C: Array) -> Grid:
        """Eq. 13 as least squares, with the j-th row sum of C as the weight of column j.

        Equal trits keep the grid of Eq. 9.
        """
        alpha, mu = self.grid(W, T)
        weights = np.array([math.fsum(row) for row in C])
        for i, (w, t) in enumerate(zip(W, T.astype(np.float64), strict=True)):
            if (t != t[0]).any():
                design = np.stack([t, np.ones_like(t)], axis=1)
                fitted = np.linalg.solve((design.T * weights) @ design, (design.T * weights) @ w)
                alpha[i, 0], mu[i, 0] = fitted
        return alpha, mu

    def root(self, C: Array) -> Array:
        """Compute R with R Rᵀ = C; the root of the last C is cached."""
        if self._rooted is None or self._rooted[0] is not C:
            values, vectors = np.linalg.eigh(C)
            self._rooted = C, vectors * np.sqrt(np.maximum(values, 0))
        return self._rooted[1]

    def weight_error(self, E: Array) -> Any:
        return math.fsum((E * E).flat)

    def output_error(self, E: Array, C: Array) -> Any:
        return math.fsum(np.square(E @ self.root(C)).flat)

    def row_errors(self, E: Array, C: Array) -> Array:
        """Compute the squared norm of e C^½ for every row e, (n,)."""
        return np.square(E @ self.root(C)).sum(axis=1)

    def similarities(self, W: Array) -> list[Any]:
        """Compute the cosine of each column with the mean column; None for a zero column."""
        mean = np.array([math.fsum(w) / len(w) for w in W])
        norm = math.sqrt(math.fsum(mean * mean))
        columns = [(w, math.sqrt(math.fsum(w * w))) for w in W.T]
        return [math.fsum(w * mean) / (length * norm) if length else None for w, length in columns]

    def cosines(self, W: Array) -> Array:
        """Eq. 15, with a separate sum for each dot product."""
        dots = self.gram(W)
        lengths = [math.sqrt(dots[j, j]) for j in range(W.shape[1])]
        return dots / np.outer(lengths, lengths)

    def solve(self, A: Array, B: Array) -> Array:
        return np.linalg.solve(A, B)

    def positive_definite(self, H: Array) -> bool:
        values = np.linalg.eigvalsh(H)
        return bool(values[0] > np.finfo(np.float64).eps * values[-1])

    def gram(self, X: Array) -> Array:
        return self.product(X.T, X)

    def product(self, A: Array, B: Array) -> Array:
        """Compute A B; each entry is a sum rounded once."""
        return np.array([[math.fsum(a * b) for b in B.T] for a in A])


def _columns(values: list[Any]) -> Array:
    return np.array(values, dtype=object)[:, None]


def _best_scales(W: Array, T: Array, C: Array) -> Array:
    """Least (w - alpha t) C (w - alpha t)ᵀ of every row, from its values at -1, 0 and 1; 0 if flat."""
    best = []
    for w, t in zip(W, rational(T), strict=True):
        left, middle, right = ((w - a * t) @ C @ (w - a * t) for a in map(Fraction, (-1, 0, 1)))
        bend = left + right - 2 * middle
        best.append((left - right) / (2 * bend) if bend else Fraction(0))
    return _columns(best)


def _least_norm(tt: Any, t1: Any, one: Any, tw: Any, w1: Any) -> tuple[Any, Any]:
    """Solution of least norm of [[tt, t1], [t1, one]] x = [tw, w1], positive semidefinite."""
    determinant = tt * one - t1 * t1
    if determinant:
        return (one * tw - t1 * w1) / determinant, (tt * w1 - t1 * tw) / determinant
    trace = tt + one
    if not trace:
        return Fraction(0), Fraction(0)
    # Rank 1: the matrix is λ v vᵀ, its pseudoinverse is v vᵀ / λ, and λ is the trace.
    return (tt * tw + t1 * w1) / trace**2, (t1 * tw + one * w1) / trace**2
