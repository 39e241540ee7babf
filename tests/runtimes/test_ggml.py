"""The rival of the benchmark of products: ggml's own product with TQ2_0 weights."""

import numpy as np
import pytest
import torch

from harness.benchmark.ggml import is_installed, tq2_0_product


@pytest.mark.parametrize("tokens", [1, 5])
def test_it_multiplies_by_the_weights_it_is_given(tokens: int) -> None:
    """Its 8-bit inputs are off by up to a 254th of the largest of 256."""
    assert is_installed()
    random = np.random.default_rng(tokens)
    weights = (0.5 * random.integers(-1, 2, (64, 512))).astype(np.float32)
    product = tq2_0_product(weights, tokens)
    for _ in range(2):
        x = torch.from_numpy(random.normal(size=(tokens, 512))).float()
        expected = x @ torch.from_numpy(weights).T
        assert (product(x) - expected).abs().max() < 0.02 * expected.abs().max()
