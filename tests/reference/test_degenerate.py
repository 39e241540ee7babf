"""What real layers and bad calibration bring along: finite, defined, or refused by name."""

from itertools import product

import numpy as np
import pytest

from reference.gptq import invert_damped
from reference.ternarize import ternarize
from reference.types import ALIGNMENTS, REORDERINGS, STARTS, TernaryConfig
from tests.reference.strategies import random_gram

EVERY = [
    TernaryConfig(4, start, reorder, itf, aga, compensation)
    for start, reorder, itf, aga, compensation in product(
        STARTS, REORDERINGS, (True, False), ALIGNMENTS, (True, False)
    )
]


def degenerate_weights():
    rng = np.random.default_rng(0)
    W = rng.normal(size=(3, 10))
    constant = W.copy()
    constant[1] = 0.1
    columns = W.copy()
    columns[:, [0, 3, 4, 9]] = 0
    equal = np.repeat(W[:, :1], 10, axis=1)
    return {
        "constant row": constant,
        "zero columns": columns,
        "equal columns": equal,
        "zero matrix": np.zeros((3, 10)),
        "two values": np.where(W > 0, 0.5, -0.25),
        "one row": W[:1],
        "one column": W[:, :1],
        "one weight": W[:1, :1],
        "one outlier": np.where(np.arange(30).reshape(3, 10) == 17, 1e4, W),
        "tiny": W * 1e-30,
        "integers": np.arange(30).reshape(3, 10),
    }


@pytest.mark.parametrize("kind", ["white", "correlated", "low rank", "outlier", "dead", "zero"])
@pytest.mark.parametrize("W", degenerate_weights().values(), ids=degenerate_weights().keys())
def test_result_is_finite_and_complete_for_every_setting(W, kind):
    C = random_gram(np.random.default_rng(1), W.shape[1], kind)
    # The printed form may be beyond float16 by right; it has its own tests.
    configs = [config for config in EVERY if config.aga != "printed"]
    # A seventh of the settings has every value of every one: 7 shares no factor with their numbers.
    for config in configs[:: 7 if W.size > 1 else 1]:
        result = ternarize(W, C, config)
        blocks = -(-W.shape[1] // 4)
        assert result.dequantize().shape == W.shape
        assert np.isfinite(result.dequantize()).all()
        assert result.scale.shape == result.shift.shape == (W.shape[0], blocks)
        assert set(np.unique(result.trits)) <= {-1, 0, 1}
        assert np.array_equal(np.sort(result.permutation), np.arange(W.shape[1]))
        figures = [*result.report.weight_errors, *result.report.output_errors.values()]
        assert np.isfinite(figures).all()


def test_constant_rows_become_their_value():
    rng = np.random.default_rng(2)
    W = rng.normal(size=(3, 12))
    W[1] = 0.1
    C = random_gram(rng, 12)
    for config in EVERY:
        if config.start == "asymmetric" and config.aga in ("none", "exact") and not config.compensation:
            result = ternarize(W, C, config)
            # float16 of 0.1; a scale left over from rounding vanishes in float16.
            assert np.array_equal(result.dequantize()[1], np.full(12, np.float16(0.1), dtype=np.float32))


@pytest.mark.parametrize("aga", ALIGNMENTS)
def test_weights_of_dead_inputs_count_for_nothing(aga):
    rng = np.random.default_rng(3)
    W, C = rng.normal(size=(4, 10)), random_gram(rng, 10) + 40
    dead = [2, 7]
    C[dead] = C[:, dead] = 0
    other, zero = W.copy(), W.copy()
    other[:, dead] = rng.normal(size=(4, 2)) * 1e6
    zero[:, dead] = 0
    for reorder in REORDERINGS:
        config = TernaryConfig(4, reorder=reorder, aga=aga)
        expected = ternarize(zero, C, config)
        for weights in (W, other):
            result = ternarize(weights, C, config)
            assert np.array_equal(result.dequantize(), expected.dequantize())
            assert result.report == expected.report


def test_matrix_that_meets_no_inputs_becomes_zero():
    W = np.random.default_rng(4).normal(size=(3, 6))
    for config in EVERY[::7]:
        result = ternarize(W, np.zeros((6, 6)), config)
        assert np.array_equal(result.dequantize(), np.zeros((3, 6)))
        assert result.report.relative_output_error == 0
        assert set(result.report.output_errors.values()) == {0.0}


def test_singular_gram_matrix_without_damping_is_refused_only_where_its_inverse_is_needed():
    rng = np.random.default_rng(5)
    W, C = rng.normal(size=(2, 6)), random_gram(rng, 6, "low rank")
    with pytest.raises(np.linalg.LinAlgError, match=r"6 inputs, 0 dead.*damping 0"):
        ternarize(W, C, TernaryConfig(2, damping=0))
    with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
        ternarize(W, C, TernaryConfig(2, damping=0, compensation=False, aga="conditional"))
    result = ternarize(W, C, TernaryConfig(2, damping=0, compensation=False))
    assert result.report.damping == 0  # and nothing is factored


def test_regular_gram_matrix_needs_no_damping():
    rng = np.random.default_rng(6)
    result = ternarize(rng.normal(size=(2, 6)), random_gram(rng, 6), TernaryConfig(2, damping=0))
    assert result.report.damping == 0


def test_damping_that_was_raised_is_reported_and_used():
    rng = np.random.default_rng(7)
    W, C = rng.normal(size=(3, 8)), random_gram(rng, 8)
    # Lower the least eigenvalue to -0.05 of the mean diagonal: 0.001 and 0.01 are too little, 0.1 is not.
    values, vectors = np.linalg.eigh(C)
    C -= np.outer(vectors[:, 0], vectors[:, 0]) * (values[0] + 0.05 * np.diag(C).mean())
    C = (C + C.T) / 2
    raised = ternarize(W, C, TernaryConfig(4, damping=0.001))
    # Repeated multiplication by ten rounds.
    assert raised.report.damping == pytest.approx(0.1, rel=1e-15)
    assert invert_damped(C, 0.001)[1] == raised.report.damping
    asked = ternarize(W, C, TernaryConfig(4, damping=0.1))
    assert np.array_equal(raised.dequantize(), asked.dequantize())


@pytest.mark.parametrize("reorder", ["none", "hessian", "random", "ssr"])
def test_damping_without_compensation_is_not_used(reorder):
    rng = np.random.default_rng(8)
    result = ternarize(
        rng.normal(size=(2, 6)), random_gram(rng, 6), TernaryConfig(3, reorder=reorder, compensation=False)
    )
    assert result.report.damping == 0


@pytest.mark.parametrize(
    ("row", "block", "weights", "name", "shown"),
    [
        # Mean 0 and trits at ±7e4: a scale beyond 65504.
        (2, 1, [7e4, -7e4, 7e4, -7e4], "scale", "70000"),
        (0, 2, [7e4, 7e4, 7e4, 7e4], "shift", "70000"),
        (1, 0, [-7e4, -7e4, -7e4, -7e4], "shift", "-70000"),
    ],
)
def test_grid_beyond_float16_is_an_error_that_names_row_and_block(row, block, weights, name, shown):
    W = np.random.default_rng(9).normal(size=(3, 12))
    W[row, 4 * block : 4 * block + 4] = weights
    config = TernaryConfig(4, reorder="none", aga="none", compensation=False)
    with pytest.raises(ValueError, match=f"the {name} of row {row}, block {block} is {shown}, beyond"):
        ternarize(W, np.eye(12), config)


def test_the_largest_float16_is_stored():
    W = np.array([[65504.0, -65504.0, 65519.0, -65519.0]])
    result = ternarize(W, np.eye(4), TernaryConfig(4, reorder="none", aga="none"))
    # 65511.5 is nearer to 65504 than to what would have been the next float16, 65536.
    assert result.scale.item() == 65504
