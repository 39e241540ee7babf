"""Matrices of the size of real models; in the stand-in, a sixteenth of it each way."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import linalg

import gpu
from gpu.device import STANDIN, xp
from gpu.ternarize import ternarize
from harness.backends import load_backend
from harness.verify.tolerances import OUTPUT_ERROR
from reference.aga import align_grid, output_error
from reference.atq import iterative_ternary_fitting
from reference.gptq import compensate, damp
from reference.ssr import select_block
from reference.ternarize import ternarize as reference_ternarize
from reference.types import BEST, TernaryConfig

SHRINK = 16 if STANDIN else 1
CONFIG = TernaryConfig(block_size=128 // (4 if STANDIN else 1))
FULL = replace(BEST, block_size=CONFIG.block_size)
TO_HOST = load_backend("gpu", "float64").to_host


def layer(rows, columns):
    """Weights that float32 holds, and the Gram matrix of inputs as a language model has them, on the device.

    A few directions carry most of the power, a few columns stand out, and there are little more tokens
    than columns.
    """
    rows, columns = rows // SHRINK, columns // SHRINK
    rng = np.random.default_rng([rows, columns])
    loud = np.where(rng.random(columns) < 0.005, 10.0, 1.0).astype(np.float32)
    W = rng.standard_normal((rows, columns), dtype=np.float32) * loud
    mixing = xp.asarray(rng.standard_normal((64, columns), dtype=np.float32) * loud)
    C = xp.zeros((columns, columns))
    for _ in range(9):
        tokens = columns // 8
        Z = xp.asarray(rng.standard_normal((tokens, 64), dtype=np.float32))
        X = Z @ mixing + xp.asarray(rng.standard_normal((tokens, columns), dtype=np.float32)) * 2
        X = X.astype(np.float64)
        C += X.T @ X
    return gpu.to_device(W), (C + C.T) / 2


@pytest.mark.parametrize(
    "config", [CONFIG, replace(BEST, block_size=CONFIG.block_size)], ids=["paper", "best"]
)
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (11008, 4096), (4096, 11008)])
def test_output_error_is_that_of_the_reference(rows, columns, config):
    W, C = layer(rows, columns)
    host_W, host_C = gpu.to_host(W).astype(np.float64), gpu.to_host(C)
    expected = output_error(host_W, reference_ternarize(host_W, host_C, config).dequantize(), host_C)
    ours = TO_HOST(ternarize(W, C, config))
    error = output_error(host_W, ours.dequantize(), host_C)
    assert error == pytest.approx(expected, rel=OUTPUT_ERROR)


@pytest.fixture(scope="module")
def largest():
    return layer(8192, 28672)


def test_the_largest_matrix_has_the_same_bytes_again_and_from_float64(largest):
    W, C = largest
    first, second, wide = (TO_HOST(ternarize(w, C, CONFIG)) for w in (W, W, W.astype(np.float64)))
    for part in ("trits", "scale", "shift", "permutation"):
        assert getattr(first, part).tobytes() == getattr(second, part).tobytes()
        assert getattr(first, part).tobytes() == getattr(wide, part).tobytes()


def test_the_first_blocks_of_the_largest_matrix_are_those_of_the_reference(largest):
    """With columns of the inverse of H from a Cholesky solve, as the whole inverse would take hours."""
    W, C = largest
    ours = TO_HOST(ternarize(W, C, CONFIG))
    W, C = gpu.to_host(W).astype(np.float64), gpu.to_host(C)
    k = CONFIG.block_size
    every = np.arange(W.shape[1])
    factor = linalg.cho_factor(damp(C, CONFIG.damping), lower=True, overwrite_a=True, check_finite=False)
    R = every
    for b in range(2):
        B = R[select_block(W[:, R], k)]
        block = slice(b * k, (b + 1) * k)
        np.testing.assert_array_equal(ours.permutation[block], B)
        _, _, T, _ = iterative_ternary_fitting(W[:, B], CONFIG.max_iterations)
        alpha, mu = (grid.astype(np.float16) for grid in align_grid(W[:, B], T, C[np.ix_(B, B)]))
        # A decision nearer to its threshold than rounding may fall otherwise.
        assert (ours.trits[:, block] != T).mean() < 1e-6
        same = (ours.trits[:, block] == T).all(axis=1)
        for stored, grid in ((ours.scale, alpha), (ours.shift, mu)):
            spacing = np.spacing(np.abs(grid[same, 0]).astype(np.float16)).astype(np.float64)
            difference = np.abs(stored[same, b].astype(np.float64) - grid[same, 0].astype(np.float64))
            assert (difference <= spacing).all()
            assert (difference == 0).mean() > 0.999
        if b == 0:
            R = np.setdiff1d(every, B)
            E = W[:, B] - (alpha.astype(np.float32) * T + mu.astype(np.float32))
            columns = linalg.cho_solve(factor, np.eye(W.shape[1])[:, B], check_finite=False)
            W[:, R] = compensate(W[:, R], E, columns[B], columns[R].T)
