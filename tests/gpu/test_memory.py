"""How much memory a matrix takes while it is fitted."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

import gpu
from gpu.device import STANDIN, xp
from gpu.ternarize import ternarize
from reference.types import BEST, TernaryConfig
from tests.reference.strategies import random_gram


def peak_of(work):
    """Most bytes that work has at a time beyond what there was."""
    if STANDIN:
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    hook = _peak_hook()
    with xp.cuda.using_allocator(xp.cuda.MemoryPool().malloc), hook:
        work()
    return hook.peak


def _peak_hook():
    class Peak(xp.cuda.MemoryHook):
        name = "Peak"
        used = peak = 0

        def malloc_postprocess(self, device_id, size, mem_size, mem_ptr, pmem_id):
            self.used += mem_size
            self.peak = max(self.peak, self.used)

        def free_postprocess(self, device_id, mem_size, mem_ptr, pmem_id):
            self.used -= mem_size

    return Peak()


@pytest.mark.parametrize(
    "config",
    [
        TernaryConfig(),
        TernaryConfig(aga="conditional"),
        BEST,
        replace(BEST, reorder="ssr", refinement="grid"),
    ],
    ids=["exact", "conditional", "best", "joint grid"],
)
def test_three_square_matrices_are_the_most_there_are(config):
    rows, columns = 16, 1536
    rng = np.random.default_rng(0)
    W = gpu.to_device(rng.normal(size=(rows, columns)))
    C = gpu.to_device(random_gram(rng, columns, "correlated"))
    ternarize(W, C, config)  # compiles kernels, and makes the libraries' workspaces
    square = 8 * columns * columns
    # C is the third, and was there before; there may be a matrix of booleans, and rows and blocks.
    assert 1.5 * square < peak_of(lambda: ternarize(W, C, config)) < 2.35 * square
