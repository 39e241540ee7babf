"""The work that estimates count."""

import numpy as np
import pytest

import gpu.ternarize as module
from gpu.device import STANDIN
from gpu.joint import damp_alive
from gpu.refine import products
from reference.types import TernaryConfig
from tests.reference.strategies import random_gram


@pytest.mark.skipif(not STANDIN, reason="CuPy's products cannot be counted")
@pytest.mark.parametrize("refinement", ["none", "grid", "descent"])
def test_products_by_h_are_those_of_the_estimate(refinement, monkeypatch):
    """An (n, k) matrix times a (k, m) matrix has n k m multiplications."""
    rows, columns = 400, 1024
    config = TernaryConfig(refinement=refinement, reorder="none", compensation=False, rounds=2)
    monkeypatch.setattr("gpu.aga.PANEL", 128)
    counted = []

    class Counted(np.ndarray):
        def __array_ufunc__(self, ufunc, method, *inputs, **options):
            if ufunc is np.matmul:
                counted.append(inputs[0].size * inputs[1].shape[1])
            plain = [a.view(np.ndarray) if isinstance(a, Counted) else a for a in inputs]
            if "out" in options:
                options["out"] = tuple(a.view(np.ndarray) for a in options["out"])
            return getattr(ufunc, method)(*plain, **options)

    monkeypatch.setattr(module, "damp_alive", lambda C, damping: damp_alive(C, damping).view(Counted))
    rng = np.random.default_rng(0)
    module.ternarize(rng.normal(size=(rows, columns)), random_gram(rng, columns), config)
    expected = products(config) * rows * columns**2
    # Half a product in 8 panels is 9/16 of one, and sums over blocks are products with 0 and 1.
    assert expected <= sum(counted) <= 1.15 * expected
