"""Rounds of joint grid and descent, and what they are worth on a layer."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.descent import descend
from reference.joint import align_jointly, whole_error
from reference.refine import refine
from reference.ternarize import ternarize
from reference.types import BEST, TernaryConfig
from tests.reference.test_joint import dequantized, rows


def correlated_layer(rows=24, columns=96, seed=1):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(4 * columns, 8)) @ rng.normal(size=(8, columns))
    X += 0.7 * rng.normal(size=X.shape)
    return rng.normal(size=(rows, columns)) + 0.1 * rng.normal(size=(rows, 1)), X.T @ X


@given(rows(), st.integers(1, 4), st.booleans())
def test_error_never_rises_and_is_that_of_what_is_returned(case, rounds, descent):
    W, T, alpha, mu, H, k = case
    before = T.copy(), alpha.copy(), mu.copy()
    new_alpha, new_mu, new_T, errors = refine(W, T, alpha, mu, H, k, rounds, descent)
    assert all(np.array_equal(was, now) for was, now in zip(before, (T, alpha, mu), strict=True))
    assert all(later <= earlier * (1 + 1e-9) + 1e-10 for earlier, later in pairwise(errors))
    first, last = (
        whole_error(W, dequantized(*grid, k), H) for grid in ((T, alpha, mu), (new_T, new_alpha, new_mu))
    )
    assert errors[0] == pytest.approx(first, rel=1e-12)
    assert errors[-1] == pytest.approx(last, rel=1e-12)
    assert len(errors) <= (2 * rounds + 2 if descent else 2)
    if not descent:
        assert np.array_equal(new_T, T)


@given(rows())
def test_steps_are_joint_grid_and_descent_in_turn(case):
    W, T, alpha, mu, H, k = case
    result = refine(W, T, alpha, mu, H, k, rounds=2)
    for step in range(2):
        alpha, mu = align_jointly(W, T, alpha, mu, H, k)
        moved = descend(W, T, alpha, mu, H, k)
        settled = np.array_equal(moved, T)
        T = moved
        if settled:
            assert len(result[3]) == 1 + 2 * (step + 1)
            break
    else:
        alpha, mu = align_jointly(W, T, alpha, mu, H, k)
        assert len(result[3]) == 6
    assert all(np.array_equal(*pair) for pair in zip(result[:3], (alpha, mu, T), strict=True))


def test_it_stops_after_four_rounds_unless_told_otherwise():
    W, C = correlated_layer()
    rng = np.random.default_rng(4)
    start = W, rng.integers(-1, 2, size=W.shape), np.ones((24, 1)), np.zeros((24, 1)), C, 96
    lengths = [len(refine(*start, **settings)[3]) for settings in ({}, {"rounds": 4}, {"rounds": 5})]
    assert lengths == [10, 10, 12]


def test_every_step_lowers_the_error_of_a_correlated_layer():
    W, C = correlated_layer()
    start = replace(BEST, block_size=32, refinement="none")
    report = ternarize(W, C, replace(start, refinement="descent")).report
    assert report is not None
    errors = report.refinement_errors
    assert len(errors) > 5
    # The last descent of a run that settles changes no trit.
    assert all(later < earlier for earlier, later in pairwise(errors[:6]))
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_step_beyond_the_paper_lowers_the_error_of_its_recipe(seed):
    W, C = correlated_layer(seed=seed)
    best = replace(BEST, block_size=32)
    paper = TernaryConfig(32)
    configs = [paper, replace(best, refinement="none"), replace(best, refinement="grid"), best]
    errors = []
    for config in configs:
        report = ternarize(W, C, config).report
        assert report is not None
        errors.append(report.relative_output_error)
    assert all(later < 0.95 * earlier for earlier, later in pairwise(errors))


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        refine([[1.0]], [[0]], [[1.0]], [[0.0]], [[1.0]], 1, rounds=0)
