"""Ternarization without a shift: exact closed forms, least squares over alpha alone, and whole matrices."""

from dataclasses import replace
from itertools import cycle, pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.aga import align_grid, output_error_gradient
from reference.atq import build_optimal_grid, iterative_ternary_fitting
from reference.joint import align_jointly, whole_error
from reference.refine import refine
from reference.ternarize import ternarize
from reference.twn import symmetric_ternarize
from reference.types import BEST, GRIDS, REFINEMENTS, REORDERINGS, TernaryConfig, TernaryMatrix
from tests.reference.strategies import (
    EPS,
    assignments,
    dyadic_matrices,
    fractions,
    layers,
    quadratic_error,
    random_gram,
    square_root,
    weights_and_trits,
)
from tests.reference.test_aga import integer_gram
from tests.reference.test_joint import dequantized, designs, rows
from tests.reference.test_ternarize import agree, layer

SYMMETRIC = TernaryConfig(shift="none")


@given(weights_and_trits(max_columns=12))
def test_scale_is_the_exact_share_of_matched_weights(case):
    W, T = case
    alpha, mu = build_optimal_grid(W, T, symmetric=True)
    assert not mu.any()
    for i, (w, t) in enumerate(zip(fractions(W), T.tolist(), strict=True)):
        squares = sum(x * x for x in t)
        expected = sum(x * y for x, y in zip(w, t, strict=True)) / squares if squares else 0
        assert alpha[i, 0] == float(expected)  # sums of multiples of 1/64 are exact; one division rounds


@settings(max_examples=30)
@given(dyadic_matrices(max_rows=2, max_columns=5))
def test_fitting_ends_between_its_start_and_the_best_of_all_assignments(W):
    alpha, mu, T, errors = iterative_ternary_fitting(W, symmetric=True)
    assert not mu.any()
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(errors))
    every = assignments(W.shape[1])
    least = 0.0
    for w, t, a in zip(W, T, alpha[:, 0], strict=True):
        # With its best scale, an assignment leaves what the weights have beside its direction.
        least += w @ w - ((every @ w) ** 2 / np.maximum(np.abs(every).sum(axis=1), 1)).max()
        nearest = np.abs(w[:, None] - a * np.array([-1, 0, 1])).min(axis=1)
        np.testing.assert_allclose(np.abs(w - a * t), nearest, rtol=0, atol=1e-14)
    assert errors[-1] >= least - 1e-12


def test_fitting_begins_where_eq_1_to_3_end():
    W = np.random.default_rng(1).normal(size=(5, 40)) + 0.5
    alpha, T = symmetric_ternarize(W)
    by_itself = iterative_ternary_fitting(W, symmetric=True)
    given_it = iterative_ternary_fitting(W, start=(alpha, 0 * alpha, T), symmetric=True)
    assert by_itself[3] == given_it[3]
    assert by_itself[3][0] == pytest.approx(np.square(W - alpha * T).sum(), rel=1e-14)
    with pytest.raises(ValueError, match="a symmetric fit must start from mu = 0"):
        iterative_ternary_fitting(W, start=(alpha, alpha, T), symmetric=True)


@given(weights_and_trits(max_columns=6), st.integers(0, 10**6))
def test_aligned_scale_is_exactly_what_eq_12_leaves(case, seed):
    W, T = case
    C = integer_gram(np.random.default_rng(seed), W.shape[1])
    alpha, mu = align_grid(W, T, C, symmetric=True)
    assert not mu.any()
    exact = fractions(C)
    for i, (w, t) in enumerate(zip(fractions(W), T.tolist(), strict=True)):
        of_t = [sum(row[j] * t[j] for j in range(len(t))) for row in exact]
        weight = sum(x * y for x, y in zip(t, of_t, strict=True))
        expected = sum(x * y for x, y in zip(w, of_t, strict=True)) / weight if weight else alpha[i, 0]
        assert alpha[i, 0] == pytest.approx(float(expected), abs=1e-10)


@given(layers())
def test_aligned_scale_has_no_slope_and_no_larger_error(case):
    W, T, C = case
    alpha, mu = align_grid(W, T, C, symmetric=True)
    start, _ = build_optimal_grid(W, T, symmetric=True)
    d_alpha, _ = output_error_gradient(W, alpha, mu, T, C)
    largest = np.linalg.eigvalsh(C)[-1]
    for i, w in enumerate(W):
        power = quadratic_error(w[None], 0 * w[None], C)
        after = quadratic_error(w[None], alpha[i] * T[i], C)
        rounding = 16 * EPS * w.size * largest * (w @ w)
        assert after <= quadratic_error(w[None], start[i] * T[i], C) + rounding
        assert after <= power + rounding
        # By central differences the error rises to both sides alike.
        ends = [quadratic_error(w[None], (alpha[i] + step) * T[i], C) for step in (0.5, -0.5)]
        assert abs(ends[0] - ends[1]) <= 1e-9 * (power + max(ends)) + 4 * rounding
        assert abs(d_alpha[i, 0]) <= 1e-9 * np.sqrt(w.size * largest * power) + 4 * w.size * rounding


def test_trits_that_nothing_depends_on_keep_the_scale_of_the_weights():
    W, T = [[1.0, 3.0, 8.0], [1.0, 2.0, 3.0]], [[1, 1, 0], [0, 0, 0]]
    alpha, mu = align_grid(W, T, np.diag([0.0, 0.0, 5.0]), symmetric=True)
    assert (alpha.tolist(), mu.tolist()) == ([[2.0], [0.0]], [[0.0], [0.0]])


@given(rows())
def test_joint_scales_reach_dense_least_squares_over_scales_alone(case):
    W, T, alpha, mu, H, k = case
    errors = []
    for _ in range(30):
        alpha, kept = align_jointly(W, T, alpha, mu, H, k, symmetric=True)
        assert np.array_equal(kept, mu)
        errors.append(whole_error(W, dequantized(T, alpha, mu, k), H))
    assert all(later <= earlier * (1 + 1e-9) + 1e-10 for earlier, later in pairwise(errors))
    root, least = square_root(H), 0.0
    blocks = alpha.shape[1]
    for w, t, m in zip(W, T, mu, strict=True):
        P = designs(t, k)
        target = w - P[:, blocks:] @ m
        solution, *_ = np.linalg.lstsq(root.T @ P[:, :blocks], root.T @ target, rcond=1e-7)
        least += np.square(root.T @ (target - P[:, :blocks] @ solution)).sum()
    power = quadratic_error(W, np.zeros_like(W), H)
    assert errors[-1] == pytest.approx(least, rel=1e-3, abs=1e-9 * (power + errors[0]))


@settings(max_examples=30)
@given(rows())
def test_refinement_leaves_mu_alone_and_never_raises_the_error(case):
    W, T, alpha, mu, H, k = case
    new_alpha, new_mu, new_T, errors = refine(W, T, alpha, mu, H, k, symmetric=True)
    assert np.array_equal(new_mu, mu)
    assert all(later <= earlier * (1 + 1e-9) + 1e-10 for earlier, later in pairwise(errors))
    found = whole_error(W, dequantized(new_T, new_alpha, new_mu, k), H)
    assert errors[-1] == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("kind", ["white", "correlated", "dead", "zero"])
@pytest.mark.parametrize("aga", ["none", "exact", "conditional"])
def test_whole_matrices_agree_with_the_dense_route(aga, kind):
    W, C = layer(4, 21, 8, kind)
    steps = product(REFINEMENTS, GRIDS, (False, True))
    for reorder, (refinement, grid, feed_forward) in zip(cycle(REORDERINGS[::-1]), steps, strict=False):
        config = replace(
            SYMMETRIC,
            block_size=9,  # the last block has 3 columns
            reorder=reorder,
            aga=aga,
            damping=0.05,
            grid=grid,
            feed_forward=feed_forward,
            refinement=refinement,
            start="twn" if feed_forward else "asymmetric",
            seed=2,
        )
        if grid == "float16":
            result = agree(W, C, config, ("scale",))
            assert result.scale.dtype == np.float16
        else:
            result = agree(W, C, config, ())
            assert result.scale.codes.dtype == np.int8
        assert result.shift is None


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("base", [TernaryConfig(16), replace(BEST, block_size=16)], ids=["paper", "best"])
def test_the_negative_of_a_matrix_has_the_negative_trits(base, grid):
    """Nothing but 0 is a center: levels, ties and orders are the same on both sides."""
    rng = np.random.default_rng(3)
    W, C = rng.normal(size=(12, 40)) + 0.4, random_gram(rng, 40, "correlated")
    config = replace(base, shift="none", grid=grid)
    one, other = ternarize(W, C, config), ternarize(-W, C, config)
    assert np.array_equal(one.trits, -other.trits)
    assert np.array_equal(one.dequantize(), -other.dequantize())
    assert one.report == other.report


def test_constant_rows_are_held_by_alpha_and_rows_of_zeros_have_none():
    rng = np.random.default_rng(2)
    W, C = rng.normal(size=(3, 12)), random_gram(rng, 12)
    W[1], W[2] = -0.1, 0
    for config in (replace(SYMMETRIC, block_size=4), replace(BEST, block_size=4, shift="none")):
        result = ternarize(W, C, config)
        constant = result.dequantize()[1]
        # What one block loses in float16 moves into the next.
        np.testing.assert_allclose(constant, -0.1, rtol=2e-3)
        assert (result.scale[1] * result.trits[1, ::4] < 0).all()
        assert not result.scale[2].any()
        assert not result.trits[2].any()


def test_levels_are_those_of_a_shift_of_zeros_to_the_sign_of_zero():
    rng = np.random.default_rng(4)
    T = rng.integers(-1, 2, size=(6, 10)).astype(np.int8)
    alpha = rng.normal(size=(6, 3)).astype(np.float16)
    alpha[0, 0] = 0
    without = TernaryMatrix(T, alpha, None, np.arange(10), 4).dequantize()
    zeros = TernaryMatrix(T, alpha, np.zeros_like(alpha), np.arange(10), 4).dequantize()
    assert without.dtype == np.float32
    assert without.tobytes() == zeros.tobytes()


def test_a_symmetric_fit_is_worse_than_a_shifted_one_on_lopsided_rows_and_no_worse_on_even_ones():
    rng = np.random.default_rng(5)
    even = rng.normal(size=(64, 128))
    even[:, 64:] = -even[:, :64]  # so that the best shift of a block of all columns is about 0
    C = np.eye(128)
    errors = [
        [
            ternarize(W, C, replace(TernaryConfig(), shift=shift)).report.relative_output_error
            for shift in ("free", "none")
        ]
        for W in (even, even + 1)
    ]
    assert errors[0][1] == pytest.approx(errors[0][0], rel=0.01)
    assert errors[1][1] > 1.2 * errors[1][0]


def test_eq_13_as_printed_has_no_form_without_a_shift():
    with pytest.raises(ValueError, match=r"aga printed \(Eq\. 13\) fits a shift"):
        TernaryConfig(aga="printed", shift="none")
    assert not TernaryConfig().symmetric
    assert SYMMETRIC.symmetric
