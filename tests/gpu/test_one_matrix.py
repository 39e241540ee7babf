"""One matrix start to end, where the configurations of `test_ternarize` cannot tell."""

import numpy as np
import pytest

import gpu
import gpu.ternarize as module
from harness.backends import load_backend
from reference.ternarize import ternarize
from reference.types import TernaryConfig
from tests.reference.strategies import random_gram


def on_gpu(W, C, config):
    return load_backend("gpu").ternarize(np.array(W, dtype=np.float64), np.array(C, dtype=np.float64), config)


def test_error_passed_on_is_that_of_the_float32_sum():
    """By hand: scale and shift are exact in float16, so only their sum in float32 makes an error."""
    alpha, mu = 819 / 8192, 60000.0
    W = [[mu + alpha, mu - alpha, 0.0]]
    C = [[2.0, 0.0, 1.0], [0.0, 2.0, 0.0], [1.0, 0.0, 1.0]]
    result = on_gpu(W, C, TernaryConfig(2, reorder="none", aga="none", damping=0))
    assert (result.scale[0, 0], result.shift[0, 0]) == (alpha, mu)
    # Near 60000 float32 has steps of 1/256: mu + alpha becomes mu + 832/8192, and C_02 / C_22 = 1 of
    # the error 819/8192 - 832/8192 goes to the last column.
    assert result.shift[0, 1] == -13 / 8192


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_block_that_lost_its_factor_is_an_error(monkeypatch, bad):
    answers = [gpu.to_device(np.bool_(block != bad)) for block in range(3)]
    monkeypatch.setattr(module, "is_factor", lambda L, diagonal: answers.pop(0))
    rng = np.random.default_rng(0)
    with pytest.raises(np.linalg.LinAlgError, match=r"lost its factor on the way, with damping 0\.01"):
        on_gpu(rng.normal(size=(2, 10)), random_gram(rng, 10), TernaryConfig(4))
    assert answers == []


@pytest.mark.parametrize("aga", ["exact", "conditional"])
def test_rows_of_equal_trits_are_aligned_as_in_the_reference(aga):
    rng = np.random.default_rng(1)
    # All weights of a row are beyond three quarters of their mean: from zero, every trit is 1.
    W, C = 1 + 0.1 * rng.uniform(-1, 1, size=(3, 12)), random_gram(rng, 12)
    config = TernaryConfig(5, start="twn", itf=False, aga=aga)
    ours, theirs = on_gpu(W, C, config), ternarize(W, C, config)
    assert (theirs.trits == 1).all()
    for part in ("trits", "scale", "shift", "permutation"):
        np.testing.assert_array_equal(getattr(ours, part), getattr(theirs, part), err_msg=part)
