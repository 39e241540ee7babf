"""PT²-LLM on device arrays: the functions of `reference`, module by module, with the same signatures.

Arrays are CuPy's where there is a CUDA device. With ``NUMBA_ENABLE_CUDASIM=1`` in the environment they
are NumPy's, so that everything but the hardware itself is checked on any machine (`gpu.device`).

Weights may be float32 or float64, and single operations give results that have the shape of weights in the
same type. Everything else is float64: factorizations need it, and so does the choice of columns, where a
rounding to float32 lets another column in and changes all that follows.
"""

from gpu.device import STANDIN, describe, identity, on_stream, to_device, to_host, use_allocator

# The printed Eq. 13 exists to show that it is wrong.
REFUSED = frozenset({"aga.align_grid_printed"})

# Types of weights, the one that takes less memory first.
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
