"""PT²-LLM on device arrays: the functions of `reference`, module by module, with the same signatures.

Arrays are CuPy's where there is a CUDA device. With ``NUMBA_ENABLE_CUDASIM=1`` in the environment they
are NumPy's, so that any machine can check everything but the hardware itself (`gpu.device`).

Weights may be float32 or float64; an operation that returns weights keeps their type. Everything else is
float64, targets included: factorizations need it, and so does the choice of columns, where rounding to
float32 would select another column and change everything after it.
"""

from gpu.device import STANDIN, describe, identity, on_stream, to_device, to_host, use_allocator

# The printed Eq. 13 exists to show that it is wrong.
REFUSED = frozenset({"aga.align_grid_printed"})

# Types of weights; the smaller one is preferred.
PRECISIONS = ("float32", "float64")

__all__ = [
    "PRECISIONS",
    "REFUSED",
    "STANDIN",
    "describe",
    "identity",
    "on_stream",
    "to_device",
    "to_host",
    "use_allocator",
]
