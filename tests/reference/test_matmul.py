"""The product from packed bytes."""

import numpy as np
import pytest

from reference.matmul import matmul
from reference.packing import pack_base3
from reference.types import TernaryMatrix


def random_case(rows, columns, block_size, tokens, seed, dtype=np.float16):
    rng = np.random.default_rng(seed)
    blocks = -(-columns // block_size)
    trits = rng.integers(-1, 2, size=(rows, columns)).astype(np.int8)
    scale = rng.normal(size=(rows, blocks)).astype(dtype)
    shift = rng.normal(size=(rows, blocks)).astype(dtype)
    return rng.normal(size=(tokens, columns)), trits, scale, shift, rng.permutation(columns)


@pytest.mark.parametrize(
    ("rows", "columns", "block_size", "tokens"),
    [(3, 7, 3, 2), (1, 1, 1, 1), (2, 5, 128, 3), (4, 10, 5, 1), (1, 6, 4, 2), (2, 11, 1, 2)],
)
def test_product_is_that_of_a_triple_loop(rows, columns, block_size, tokens):
    x, trits, scale, shift, permutation = random_case(rows, columns, block_size, tokens, columns)
    expected = np.zeros((tokens, rows))
    for token in range(tokens):
        for row in range(rows):
            for j in range(columns):
                b = j // block_size
                weight = float(scale[row, b]) * int(trits[row, j]) + float(shift[row, b])
                expected[token, row] += weight * x[token, permutation[j]]
    y = matmul(x, pack_base3(trits), scale, shift, permutation, block_size)
    assert y.dtype == np.float64
    # At most 22 products of size about 1 in another order: a few dozen roundings.
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-13)


def test_product_is_that_of_the_dequantized_matrix():
    x, trits, scale, shift, permutation = random_case(40, 333, 128, 7, 5)
    W_hat = TernaryMatrix(trits, scale, shift, permutation, 128).dequantize()
    y = matmul(x, pack_base3(trits), scale, shift, permutation, 128)
    # dequantize() rounds each of 333 weights of size about 2 to float32: 333 · 2 · 2^-24 · |x|.
    np.testing.assert_allclose(y, x @ W_hat.astype(np.float64).T, rtol=0, atol=2e-4)


def test_integers_give_the_exact_product():
    rng = np.random.default_rng(8)
    trits = rng.integers(-1, 2, size=(5, 23)).astype(np.int8)
    scale, shift = rng.integers(-4, 5, size=(2, 5, 3)).astype(np.float16)
    permutation = rng.permutation(23)
    x = rng.integers(-9, 10, size=(4, 23))
    W_hat = np.zeros((5, 23), dtype=np.int64)
    for j in range(23):
        W_hat[:, permutation[j]] = scale[:, j // 10] * trits[:, j] + shift[:, j // 10]
    assert np.array_equal(matmul(x, pack_base3(trits), scale, shift, permutation, 10), x @ W_hat.T)


def changed(**changes):
    x, trits, scale, shift, permutation = random_case(3, 7, 3, 2, 0)
    given = {
        "x": x,
        "packed": pack_base3(trits),
        "scale": scale,
        "shift": shift,
        "permutation": permutation,
        "block_size": 3,
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": np.zeros((3, 2))}, "scale"),
        ({"shift": np.zeros((2, 3))}, "shift"),
        ({"shift": np.full((3, 3), np.nan)}, "shift"),
        ({"x": np.full((2, 7), np.inf)}, "x"),
        ({"x": np.zeros((2, 12))}, "bytes a row"),
        ({"packed": np.full((3, 2), 243, dtype=np.uint8)}, "byte 243"),
        ({"permutation": np.arange(6)}, "permutation"),
        ({"permutation": np.zeros(7, dtype=int)}, "permutation"),
        ({"permutation": np.arange(7) - 1}, "permutation"),
        ({"block_size": 0}, "block_size"),
    ],
)
def test_input_that_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        matmul(**changed(**changes))
