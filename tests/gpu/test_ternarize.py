"""Whole matrices against the reference."""

from dataclasses import replace

import numpy as np
import pytest

import gpu
from gpu.grids import encode, row_factor
from harness.backends import load_backend
from reference.ternarize import ternarize
from reference.types import BEST, TernaryConfig
from tests.reference.strategies import random_gram

CONFIGS = {
    "default": TernaryConfig(),
    "conditional": TernaryConfig(aga="conditional"),
    "no alignment": TernaryConfig(aga="none"),
    "hessian": TernaryConfig(reorder="hessian"),
    "random": TernaryConfig(reorder="random", seed=3),
    "in order": TernaryConfig(reorder="none"),
    "symmetric start": TernaryConfig(start="twn"),
    "initialization only": TernaryConfig(itf=False, aga="none"),
    "no compensation": TernaryConfig(compensation=False),
    "conditional, no compensation": TernaryConfig(aga="conditional", compensation=False),
    "narrow blocks": TernaryConfig(block_size=50),
    # Ten blocks: columns are moved together after some of them only.
    "narrowest blocks": TernaryConfig(block_size=16),
    "narrowest blocks, random": TernaryConfig(block_size=16, reorder="random"),
    "narrowest blocks, no compensation": TernaryConfig(block_size=16, compensation=False),
    "one wide block": TernaryConfig(block_size=1000),
    "few rounds": TernaryConfig(max_iterations=2),
    "best": replace(BEST, block_size=32),
    "best, one wide block": BEST,
    "best, one block": replace(BEST, block_size=1000),
    "best, narrowest blocks, one round": replace(BEST, block_size=16, rounds=1),
    "best, by similarity": replace(BEST, block_size=50, reorder="ssr"),
    "best, random, no compensation": replace(BEST, block_size=50, reorder="random", compensation=False),
    "fed forward": TernaryConfig(feed_forward=True),
    "fed forward, no alignment": TernaryConfig(feed_forward=True, aga="none", compensation=False),
    "joint grid": TernaryConfig(refinement="grid", block_size=50),
    "symmetric": TernaryConfig(shift="none"),
    "symmetric, initialization only": TernaryConfig(shift="none", itf=False, aga="none", block_size=50),
    "symmetric, best": replace(BEST, shift="none", block_size=32),
    "descent alone": TernaryConfig(refinement="descent", aga="none", compensation=False, reorder="none"),
}


def layer(rows=60, columns=151, kind="outlier"):
    rng = np.random.default_rng([rows, columns])
    W = rng.normal(size=(rows, columns)) * rng.uniform(0.5, 2, size=columns) + 0.2
    return W.astype(np.float32).astype(np.float64), random_gram(rng, columns, kind)


class OnHost:
    """The backend's ternarize, from NumPy arrays to NumPy arrays."""

    backend = load_backend("gpu")

    def ternarize(self, W, C, config):
        return self.backend.to_host(self.backend.ternarize(W, C, config))


@pytest.fixture(scope="module")
def backend():
    return OnHost()


@pytest.mark.parametrize("name", CONFIGS)
def test_float64_gives_the_matrix_of_the_reference(backend, name):
    W, C = layer()
    ours, theirs = backend.ternarize(W, C, CONFIGS[name]), ternarize(W, C, CONFIGS[name])
    for part in ("trits", "scale", "shift", "permutation"):
        np.testing.assert_array_equal(getattr(ours, part), getattr(theirs, part), err_msg=part)
        assert np.asarray(getattr(ours, part)).dtype == np.asarray(getattr(theirs, part)).dtype
    assert (theirs.shift is None) == CONFIGS[name].symmetric
    for figure in vars(theirs.report):
        assert getattr(ours.report, figure) == pytest.approx(getattr(theirs.report, figure), rel=1e-9)


@pytest.mark.parametrize(
    "base", [TernaryConfig(), BEST, replace(BEST, shift="none")], ids=["paper", "best", "symmetric"]
)
@pytest.mark.parametrize("kind", ["white", "correlated", "dead", "outlier"])
def test_grids_in_8_bits_are_those_of_the_reference(backend, kind, base):
    W, C = layer(60, 151, kind)
    W[7], W[8] = 0, W[8] * 1e-3
    config = replace(base, block_size=50, grid="int8")
    ours, theirs = backend.ternarize(W, C, config), ternarize(W, C, config)
    np.testing.assert_array_equal(ours.trits, theirs.trits)
    assert (ours.shift is None) == config.symmetric
    for name in ("scale",) if config.symmetric else ("scale", "shift"):
        mine, expected = getattr(ours, name), getattr(theirs, name)
        for part in ("codes", "row", "block"):
            np.testing.assert_array_equal(getattr(mine, part), getattr(expected, part))
            assert getattr(mine, part).dtype == getattr(expected, part).dtype
    np.testing.assert_array_equal(ours.dequantize(), theirs.dequantize())


def test_grids_beyond_8_bits_are_refused(backend):
    # Compensation makes the later columns far larger than the weights of their row were.
    row = gpu.to_device(np.ones((2, 1), np.float16))
    with pytest.raises(ValueError, match="1e\\+09 times its row's weights, beyond float16"):
        encode(gpu.to_device(np.array([[1.0], [1e9]])), row)
    with pytest.raises(ValueError, match="the weights of row 1 have a root mean square of 1e\\+06"):
        row_factor(gpu.to_device(np.array([[1.0, 1.0], [1e6, -1e6]])))
    zero = encode(gpu.to_device(np.zeros((2, 1))), row)
    assert not gpu.to_host(zero.decode()).any()


@pytest.mark.parametrize("config", [TernaryConfig(), BEST], ids=["paper", "best"])
@pytest.mark.parametrize("kind", ["white", "correlated", "dead", "outlier"])
def test_weights_in_float32_give_the_matrix_of_the_reference(backend, kind, config):
    W, C = layer(130, 577, kind)
    ours, theirs = backend.ternarize(W.astype(np.float32), C, config), ternarize(W, C, config)
    for part in ("trits", "scale", "shift", "permutation"):
        np.testing.assert_array_equal(getattr(ours, part), getattr(theirs, part), err_msg=part)


@pytest.mark.parametrize("config", [TernaryConfig(), BEST], ids=["paper", "best"])
def test_the_report_is_true_of_what_is_stored(backend, config):
    W, C = layer()
    result = backend.ternarize(W, C, config)
    E = W - result.dequantize()
    power = ((W @ C) * W).sum()
    assert result.report.relative_output_error == pytest.approx(((E @ C) * E).sum() / power, rel=1e-9)


@pytest.mark.parametrize("config", [TernaryConfig(), BEST], ids=["paper", "best"])
def test_two_runs_give_the_same_bytes(backend, config):
    W, C = layer()
    first, second = (backend.ternarize(W.astype(np.float32), C, config) for _ in range(2))
    for part in ("trits", "scale", "shift", "permutation"):
        assert getattr(first, part).tobytes() == getattr(second, part).tobytes()


@pytest.mark.parametrize("config", [TernaryConfig(), BEST], ids=["paper", "best"])
def test_dead_inputs_do_not_reach_the_result(backend, config):
    W, C = layer(kind="dead")
    (dead,) = np.flatnonzero(np.diag(C) == 0)
    other = W.copy()
    other[:, dead] = 1e6
    a, b = backend.ternarize(W, C, config), backend.ternarize(other, C, config)
    np.testing.assert_array_equal(a.trits, b.trits)


def test_the_damping_rises_in_the_steps_of_the_reference(backend):
    W, C = layer(columns=40)
    C = C - 0.05 * np.diag(C).mean() * np.eye(40) * (np.arange(40) == 3)
    C[3, 3] = 1e-9  # off-diagonal entries that no Gram matrix has
    config = TernaryConfig(damping=1e-6)
    ours, theirs = backend.ternarize(W, C, config), ternarize(W, C, config)
    assert theirs.report.damping > config.damping
    assert ours.report.damping == theirs.report.damping


def test_a_singular_gram_matrix_without_damping_is_an_error(backend):
    W, C = layer(columns=12, kind="low rank")
    with pytest.raises(np.linalg.LinAlgError, match=r"not positive definite with damping 0;"):
        backend.ternarize(W, C, TernaryConfig(damping=0.0))


@pytest.mark.parametrize(("row", "column", "block"), [(2, 0, 0), (1, 100, 1)])
def test_a_scale_beyond_float16_is_named(backend, row, column, block):
    W, C = layer(rows=4)
    W[row, column] = 1e8
    config = TernaryConfig(reorder="none", block_size=64, compensation=False)
    with pytest.raises(ValueError, match=rf"of row {row}, block {block} is .* beyond what float16 holds"):
        backend.ternarize(W, C, config)


def test_eq_13_as_printed_is_refused(backend):
    W, C = layer(rows=2, columns=5)
    with pytest.raises(ValueError, match="only in the reference"):
        backend.ternarize(W, C, replace(TernaryConfig(), aga="printed"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_named(backend, bad):
    W, C = layer(rows=3, columns=5)
    W[1, 4] = bad
    with pytest.raises(ValueError, match=r"W\[1, 4\]"):
        backend.ternarize(W, C, TernaryConfig())
