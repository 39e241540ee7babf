"""The settings, what a checkpoint holds, and the figures of the fit."""

import dataclasses

import numpy as np
import pytest

from golden import whole
from golden.arithmetic import Dense
from reference.ternarize import ternarize
from reference.types import (
    ALIGNMENTS,
    BEST,
    REFINEMENTS,
    REORDERINGS,
    SHIFTS,
    STARTS,
    TernaryConfig,
    TernaryMatrix,
)
from tests.reference.strategies import random_gram


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "gaussian"}, "start must be one of asymmetric, twn, got 'gaussian'"),
        ({"reorder": "cosine"}, "reorder must be one of none, random, hessian, ssr, got 'cosine'"),
        ({"aga": "on"}, "aga must be one of none, exact, printed, conditional, got 'on'"),
        ({"refinement": "full"}, "refinement must be one of none, grid, descent, got 'full'"),
        ({"shift": "zero"}, "shift must be one of free, none, got 'zero'"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"max_iterations": 0}, "max_iterations must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"damping": -0.1}, "damping must be finite and not negative, got -0.1"),
        ({"damping": float("nan")}, "damping must be finite"),
        ({"damping": float("inf")}, "damping must be finite"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TernaryConfig(**changes)


def test_defaults_are_those_of_the_paper_and_of_gptq():
    paper = TernaryConfig(
        128, "asymmetric", "ssr", True, "exact", True, 0.01, 100, 0, "float16", False, "none"
    )
    assert TernaryConfig() == paper


def test_settings_cannot_change_after_the_fact():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TernaryConfig().damping = 0.5


def test_dequantize_by_hand():
    matrix = TernaryMatrix(
        trits=np.array([[1, 0, -1], [0, 1, 1]], dtype=np.int8),
        scale=np.array([[0.5, 2.0], [-1.0, 4.0]], dtype=np.float16),
        shift=np.array([[0.25, 0.0], [1.0, -8.0]], dtype=np.float16),
        permutation=np.array([2, 0, 1]),
        block_size=2,
    )
    W_hat = matrix.dequantize()
    # Column 2 is the first trit, column 0 the second, and column 1 the third, in the second block.
    assert W_hat.tolist() == [[0.25, -2.0, 0.75], [0.0, -4.0, 1.0]]
    assert W_hat.dtype == np.float32


def test_dequantize_adds_in_float32():
    alpha, mu = np.float16(0.1), np.float16(1000)
    matrix = TernaryMatrix(
        np.array([[1, -1]], dtype=np.int8), np.array([[alpha]]), np.array([[mu]]), np.arange(2), 2
    )
    expected = [float(np.float32(mu) + np.float32(alpha)), float(np.float32(mu) - np.float32(alpha))]
    assert matrix.dequantize().tolist() == [expected]
    # In float16 the sum would have been 1000.
    assert expected[0] != 1000


CONFIGS = [
    TernaryConfig(4, start, reorder, itf, aga, compensation)
    for start, reorder, itf, aga, compensation in [
        ("asymmetric", "ssr", True, "exact", True),
        ("asymmetric", "hessian", True, "conditional", True),
        ("asymmetric", "none", True, "printed", True),
        ("twn", "none", True, "none", True),
        ("twn", "random", False, "exact", False),
        ("asymmetric", "ssr", False, "none", False),
    ]
]
CONFIGS += [
    dataclasses.replace(CONFIGS[0], feed_forward=True, refinement="grid"),
    dataclasses.replace(CONFIGS[1], feed_forward=True),
    dataclasses.replace(CONFIGS[2], refinement="descent", block_size=9),
    dataclasses.replace(CONFIGS[5], refinement="descent", rounds=1),
    dataclasses.replace(BEST, block_size=5),
    dataclasses.replace(BEST, block_size=5, shift="none"),
    dataclasses.replace(CONFIGS[0], shift="none"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=map(str, range(len(CONFIGS))))
@pytest.mark.parametrize("dead", [False, True])
def test_figures_of_the_fit_are_those_of_their_definitions(config, dead):
    rng = np.random.default_rng(1)
    W, C = rng.normal(size=(9, 14)) + 0.2, random_gram(rng, 14) + 30
    if dead:
        C[5] = C[:, 5] = 0
    result = ternarize(W, C, config)
    order = result.permutation.tolist() if config.reorder == "random" else None
    answer = whole.ternarize(Dense(), W, C, order, **dataclasses.asdict(config))
    figures = dataclasses.asdict(result.report)
    assert list(figures["output_errors"]) == ["init", "itf", "aga"]
    figures["output_errors"] = list(figures["output_errors"].values())
    assert {f"report.{name}" for name in figures} == {name for name in answer if name.startswith("report.")}
    # Shares of sums of a hundred squares; the two routes' grids differ by 1e-12.
    tolerances = {"weight_errors": 1e-10, "aligned_weight_error": 1e-10, "output_errors": 1e-9}
    tolerances |= {"relative_output_error": 1e-6}
    for name, figure in figures.items():
        expected = answer[f"report.{name}"].tolist()
        assert figure == pytest.approx(expected, rel=tolerances.get(name, 1e-12)), name
    assert (figures["iterations"] == 0) == (not config.itf)
    damped = config.compensation or config.feed_forward or config.refinement != "none"
    assert figures["damping"] == (config.damping if damped else 0)
    assert bool(figures["refinement_errors"]) == (config.refinement != "none")


def test_dead_weights_do_not_count_in_any_figure():
    rng = np.random.default_rng(2)
    W, C = rng.normal(size=(3, 8)), random_gram(rng, 8, "dead")
    moved = W + 100 * (np.diag(C) == 0)
    assert ternarize(W, C, TernaryConfig(4)).report == ternarize(moved, C, TernaryConfig(4)).report


def test_shares_do_not_depend_on_the_size_of_the_weights():
    rng = np.random.default_rng(3)
    W, C = rng.normal(size=(3, 8)), random_gram(rng, 8)
    # Powers of two that leave float16 scales normal; the powers of W fall below 1.
    small, large = (ternarize(W * size, C, TernaryConfig(4)).report for size in (2.0**-6, 1.0))
    assert small.output_power < large.output_power
    assert small.weight_power < 1
    assert small.weight_errors == large.weight_errors
    assert small.output_errors == large.output_errors


def test_names_of_the_settings_are_those_of_the_checkpoint():
    assert STARTS == ("asymmetric", "twn")
    assert REORDERINGS == ("none", "random", "hessian", "ssr")
    assert ALIGNMENTS == ("none", "exact", "printed", "conditional")
    assert SHIFTS == ("free", "none")
    assert REFINEMENTS == ("none", "grid", "descent")
