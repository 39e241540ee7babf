"""One weight matrix from start to end, against a second implementation by another route."""

from dataclasses import asdict
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golden import whole
from golden.arithmetic import Dense
from golden.whole import conditional_cost, remaining
from reference.ternarize import ternarize
from reference.types import ALIGNMENTS, REORDERINGS, STARTS, TernaryConfig
from tests.reference.strategies import layers, quadratic_error, random_gram


def layer(rows, columns, seed, kind="white"):
    """Weights and a Gram matrix of inputs with a common part, whose row sums are positive."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(rows, columns)) + 0.3 * rng.normal(size=(rows, 1))
    C = random_gram(rng, columns, kind)
    alive = np.diag(C) > 0
    return W, C + 2 * columns * np.outer(alive, alive)


def damped(C, damping):
    H, used = whole.damped(Dense(), C, damping)
    assert used == damping
    return H


def agree(W, C, config, grids=("scale", "shift")):
    """Compare with the composition of the golden answers, which keeps no running inverse."""
    result = ternarize(W, C, config)
    order = result.permutation.tolist() if config.reorder == "random" else None
    answer = whole.ternarize(Dense(), W, C, order, **asdict(config))
    # Equal after rounding to what is stored: the routes differ by 1e-12, a float16 is 1e-3 wide.
    for name in ("trits", "permutation") + (grids if config.grid == "float16" else ()):
        assert np.array_equal(getattr(result, name), answer[name]), name
    assert np.array_equal(result.dequantize(), answer["weights"])
    return result


SHAPES = [(4, 11, 4), (3, 7, 16), (2, 6, 1), (5, 12, 3)]


@pytest.mark.parametrize("aga", ALIGNMENTS)
@pytest.mark.parametrize("reorder", REORDERINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_combination_of_settings_agrees_with_the_dense_route(shape, reorder, aga):
    rows, columns, block_size = shape
    W, C = layer(rows, columns, seed=columns)
    for start, itf, compensation in product(STARTS, (True, False), (True, False)):
        config = TernaryConfig(block_size, start, reorder, itf, aga, compensation, seed=3)
        result = agree(W, C, config)
        assert result.trits.dtype == np.int8
        assert result.scale.dtype == result.shift.dtype == np.float16
        assert result.scale.shape == result.shift.shape == (rows, -(-columns // block_size))
        assert result.block_size == block_size


@pytest.mark.parametrize("kind", ["correlated", "low rank", "outlier", "dead", "zero"])
@pytest.mark.parametrize("aga", ["exact", "conditional"])
def test_every_kind_of_input_agrees_with_the_dense_route(kind, aga):
    W, C = layer(4, 10, 5, kind)
    for reorder, compensation in product(REORDERINGS, (True, False)):
        agree(W, C, TernaryConfig(4, reorder=reorder, aga=aga, compensation=compensation, damping=0.05))


@pytest.mark.parametrize("kind", ["correlated", "outlier", "dead", "zero"])
def test_grids_in_8_bits_agree_with_the_dense_route(kind):
    W, C = layer(6, 30, 11, kind)
    W[2] *= 1e-3  # beside rows a thousand times larger
    for reorder, aga, compensation in product(("none", "ssr"), ("exact", "conditional"), (True, False)):
        config = TernaryConfig(
            8, reorder=reorder, aga=aga, compensation=compensation, damping=0.05, grid="int8"
        )
        result = agree(W, C, config)
        assert result.scale.codes.dtype == result.shift.codes.dtype == np.int8
        assert result.scale.row is result.shift.row


# Fed forward or not, by every refinement, and the rounds it takes.
BEYOND = list(product((False, True), [("none", 4), ("grid", 4), ("descent", 1), ("descent", 4)]))[1:]


@pytest.mark.parametrize("kind", ["white", "correlated", "dead", "zero", "outlier"])
@pytest.mark.parametrize("reorder", REORDERINGS)
@pytest.mark.parametrize(("feed_forward", "refinement"), BEYOND)
def test_steps_beyond_the_paper_agree_with_the_dense_route(feed_forward, refinement, reorder, kind):
    W, C = layer(4, 21, 14, kind)
    for block_size, aga, compensation, grid in (
        (9, "conditional", True, "float16"),  # the last block has 3 columns
        (21, "exact", True, "int8"),
        (8, "none", False, "float16"),
        (10, "printed", True, "int8"),  # the last block has 1
    ):
        agree(
            W,
            C,
            TernaryConfig(
                block_size,
                reorder=reorder,
                aga=aga,
                compensation=compensation,
                damping=0.05,
                grid=grid,
                feed_forward=feed_forward,
                refinement=refinement[0],
                rounds=refinement[1],
                seed=5,
            ),
        )


@pytest.mark.parametrize("limit", [1, 2])
def test_limit_of_rounds_agrees_with_the_dense_route(limit):
    W, C = layer(12, 60, 6)
    full = ternarize(W, C, TernaryConfig(30)).report.iterations
    assert full > limit
    result = agree(W, C, TernaryConfig(30, max_iterations=limit))
    assert result.report.iterations == limit


def test_wider_blocks_agree_with_the_dense_route():
    W, C = layer(6, 150, 7)
    for aga in ("exact", "conditional"):
        agree(W, C, TernaryConfig(aga=aga))


@pytest.mark.parametrize("aga", ["exact", "conditional"])
@pytest.mark.parametrize("reorder", ["none", "ssr"])
def test_block_costs_of_what_is_stored_add_up_to_the_whole_error(aga, reorder):
    """The identity behind aga="conditional", and that its grid has the least of this cost."""
    W, C = layer(5, 13, 8)
    result = ternarize(W, C, TernaryConfig(4, reorder=reorder, aga=aga, damping=0.1))
    H, W_hat = damped(C, 0.1), result.dequantize().astype(np.float64)
    order, total = result.permutation.tolist(), 0.0
    for b in range(4):
        done, block, later = order[: 4 * b], order[4 * b : 4 * b + 4], order[4 * b + 4 :]
        W_B = remaining(Dense(), W, W_hat, H, done, block + later)[:, : len(block)]
        cost = conditional_cost(Dense(), H, block, later)
        own = quadratic_error(W_B, W_hat[:, block], cost)
        total += own
        if aga == "conditional":
            T = result.trits[:, 4 * b : 4 * b + 4]
            for step in (0.02, -0.02):
                # A fiftieth is twenty times the rounding to float16 of values of size 1.
                assert own < quadratic_error(W_B, W_hat[:, block] + step, cost)
                assert own < quadratic_error(W_B, W_hat[:, block] + step * T, cost) or not T.any()
    # The condition of H is below 1e3.
    assert total == pytest.approx(quadratic_error(W, W_hat, H), rel=1e-11)


def test_conditional_cost_is_never_above_the_plain_one():
    W, C = layer(6, 40, 9)
    errors = {}
    for aga in ("exact", "conditional"):
        # One block before the last: with the same trits, its share of the whole error can be compared.
        config = TernaryConfig(39, reorder="none", aga=aga)
        result = ternarize(W, C, config)
        H = damped(C, config.damping)
        first = list(range(39))
        errors[aga] = quadratic_error(
            W[:, :39], result.dequantize()[:, :39], conditional_cost(Dense(), H, first, [39])
        )
    assert errors["conditional"] < errors["exact"]


def test_compensation_reduces_the_output_error():
    W, C = layer(24, 60, 10, "correlated")
    for reorder in ("none", "ssr"):
        with_, without = (
            ternarize(W, C, TernaryConfig(12, reorder=reorder, compensation=on)).report.relative_output_error
            for on in (True, False)
        )
        assert with_ < without


def test_random_order_is_a_permutation_set_by_the_seed():
    W, C = layer(2, 30, 11)
    orders = [
        ternarize(W, C, TernaryConfig(5, reorder="random", seed=seed)).permutation for seed in (0, 0, 1)
    ]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], np.arange(30))
    assert all(np.array_equal(np.sort(order), np.arange(30)) for order in orders)


def test_error_passed_on_is_that_of_the_float32_sum():
    """By hand: scale and shift are exact in float16, so only their sum in float32 makes an error."""
    alpha, mu = 819 / 8192, 60000.0
    W = [[mu + alpha, mu - alpha, 0.0]]
    C = [[2.0, 0.0, 1.0], [0.0, 2.0, 0.0], [1.0, 0.0, 1.0]]
    result = ternarize(W, C, TernaryConfig(2, reorder="none", aga="none", damping=0))
    assert (result.scale[0, 0], result.shift[0, 0]) == (alpha, mu)
    # Near 60000 float32 has steps of 1/256: mu + alpha becomes mu + 832/8192, and C_02 / C_22 = 1 of
    # the error 819/8192 - 832/8192 goes to the last column.
    assert result.shift[0, 1] == -13 / 8192


def test_weights_on_a_ternary_grid_come_back_unchanged():
    rng = np.random.default_rng(12)
    T = rng.integers(-1, 2, size=(6, 20))
    alpha, mu = rng.integers(1, 9, size=(2, 6, 1)) / 8
    W = alpha * T + mu
    for reorder, aga in product(REORDERINGS, ALIGNMENTS):
        result = ternarize(W, random_gram(rng, 20), TernaryConfig(20, reorder=reorder, aga=aga))
        # Eighths are exact in float16, and nothing is lost, so nothing is compensated.
        assert np.array_equal(result.dequantize(), W)
        assert result.report.relative_output_error == 0


def test_input_is_left_alone():
    W, C = layer(3, 9, 13, "dead")
    before = W.copy(), C.copy()
    ternarize(W, C)
    assert np.array_equal(W, before[0])
    assert np.array_equal(C, before[1])


@settings(max_examples=40)
@given(layers(), st.integers(1, 14), st.sampled_from(REORDERINGS), st.sampled_from(ALIGNMENTS[:2]))
def test_any_layer_has_a_finite_result_that_is_never_worse_than_the_row_mean(layer, k, reorder, aga):
    W, _, C = layer
    config = TernaryConfig(k, reorder=reorder, aga=aga)
    result = ternarize(W, C, config)
    assert np.isfinite(result.dequantize()).all()
    assert np.array_equal(np.sort(result.permutation), np.arange(W.shape[1]))
    report = result.report
    # A sum over blocks of errors that each round by about 1e-16 of the power.
    for before, after in pairwise(report.weight_errors):
        assert after <= before + 1e-14
    assert report.output_errors["aga"] <= report.output_errors["itf"] + 1e-13
    H, W_hat = damped(C, config.damping), result.dequantize().astype(np.float64)
    alive = np.where(np.diag(C) == 0, 0, W)
    order = result.permutation.tolist()
    weight_mean = output_mean = 0.0
    for first in range(0, len(order), k):
        done, rest = order[:first], order[first:]
        W_B = remaining(Dense(), alive, W_hat, H, done, rest)[:, :k]
        mean = W_B.mean(axis=1, keepdims=True)
        block = rest[:k]
        weight_mean += np.square(W_B - mean).sum()
        output_mean += quadratic_error(W_B, np.broadcast_to(mean, W_B.shape), C[np.ix_(block, block)])
    # H of a single direction has the condition 1e3 at this damping, times what W_hat feeds back.
    assert report.weight_errors[-1] * report.weight_power <= weight_mean * (1 + 1e-9) + 1e-12
    if aga == "exact":
        scale = 1e-12 * np.trace(C) * np.square(W).sum()
        assert report.output_errors["aga"] * report.output_power <= output_mean * (1 + 1e-9) + scale
