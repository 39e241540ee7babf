"""ggml's product with TQ2_0 weights, the fastest ternary product of stock runtimes on a CPU, as a rival.

ggml is taken from the wheel xllamacpp. TQ2_0 holds alpha * t in blocks of 256 columns, and the product rounds
x to 8 bits.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

F32, TQ2_0 = 0, 35  # of enum ggml_type
BLOCK = 256
ROOM = 2**20  # for the tensors' headers, the graph and what its threads write


class _Settings(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def is_installed() -> bool:
    """Whether the wheel is there."""
    return importlib.util.find_spec("xllamacpp") is not None


def tq2_0_product(weights: np.ndarray, tokens: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make a product with weights that are rounded to TQ2_0.

    Parameters
    ----------
    weights : (n, m) float32 array
        m must be a multiple of 256.
    tokens : int
        Rows of x.

    Returns
    -------
    callable
        Maps (tokens, m) activations to (tokens, n) float32, on as many threads as torch uses.
    """
    import gguf
    from xllamacpp import xllamacpp

    library = ctypes.CDLL(xllamacpp.__file__)
    kind: Any = gguf.GGMLQuantizationType.TQ2_0
    packed = gguf.quantize(np.ascontiguousarray(weights, np.float32), kind)
    rows, columns = weights.shape

    def call(name: str, *arguments: Any, result: Any = ctypes.c_void_p) -> Any:
        function = getattr(library, name)
        function.restype = result
        return function(*arguments)

    # ggml's own buffer for x in 8 bits is larger than x for few columns.
    size = packed.nbytes + 8 * tokens * (rows + columns) + ROOM
    library.ggml_init.argtypes = [_Settings]
    context = ctypes.c_void_p(call("ggml_init", _Settings(size, None, False)))

    def tensor(kind: int, width: int, height: int) -> ctypes.c_void_p:
        sides = ctypes.c_int64(width), ctypes.c_int64(height)
        return ctypes.c_void_p(call("ggml_new_tensor_2d", context, kind, *sides))

    def data_of(made: ctypes.c_void_p) -> int:
        return call("ggml_get_data", made)

    weight, x_made = tensor(TQ2_0, columns, rows), tensor(F32, columns, tokens)
    ctypes.memmove(data_of(weight), packed.ctypes.data, packed.nbytes)
    y_made = ctypes.c_void_p(call("ggml_mul_mat", context, weight, x_made))
    graph = ctypes.c_void_p(call("ggml_new_graph", context))
    call("ggml_build_forward_expand", graph, y_made, result=None)
    y_data = (ctypes.c_float * (tokens * rows)).from_address(data_of(y_made))
    y = torch.frombuffer(y_data, dtype=torch.float32).view(tokens, rows)

    def product(x: torch.Tensor) -> torch.Tensor:
        given = x.float().contiguous()
        ctypes.memmove(data_of(x_made), given.data_ptr(), given.numel() * 4)
        status = call(
            "ggml_graph_compute_with_ctx", context, graph, torch.get_num_threads(), result=ctypes.c_int
        )
        if status:
            raise RuntimeError(f"ggml returned status {status}")
        return y

    return product
