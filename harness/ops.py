"""The packed product as an operation of torch, for ``torch.compile`` and CUDA graphs.

``torch.ops.pt2_llm.ternary_linear`` takes what `harness.layout.PackedTensors` describes. On a CUDA device it
runs the kernels of `gpu`; elsewhere plain torch unpacks the same tensors, which is slow, and the kernels'
reference in tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from harness.layout import PAIRS, PackedTensors


@torch.library.custom_op("pt2_llm::ternary_linear", mutates_args=())
def ternary_linear(
    x: torch.Tensor,
    words: torch.Tensor,
    grid: torch.Tensor,
    permutation: torch.Tensor,
    row_factors: torch.Tensor | None,
    block_factors: torch.Tensor | None,
    ends: list[int],
    block_size: int,
    columns: int,
    in_float16: bool,
) -> torch.Tensor:
    """``x @ W_hat.T``, of one matrix or of several side by side.

    Parameters
    ----------
    x : (tokens, m) tensor
        Activations.
    words, grid, permutation, row_factors, block_factors, ends, block_size, columns, in_float16
        As in `harness.layout.PackedTensors`.

    Returns
    -------
    (tokens, n) tensor of the type of x
    """
    packed = PackedTensors(
        words, grid, permutation, row_factors, block_factors, ends, block_size, columns, in_float16
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    weights = torch.cat([packed.part(index).dequantize(block_size, wide) for index in range(len(ends))])
    return (x.to(wide) @ weights.T).to(x.dtype)


@ternary_linear.register_fake
def _(x: torch.Tensor, *weights: Any) -> torch.Tensor:
    packed = PackedTensors._make(weights)
    torch._check(x.shape[1] == packed.columns, lambda: f"x has shape {x.shape}, not {packed.columns} columns")
    return x.new_empty(x.shape[0], packed.ends[-1])


@ternary_linear.register_kernel("cuda")
def _(x: torch.Tensor, *weights: Any) -> torch.Tensor:
    packed = PackedTensors._make(weights)
    return multiply_by_kernels(x, packed, torch.cuda.current_stream(x.device).cuda_stream)


def multiply_by_kernels(x: torch.Tensor, packed: PackedTensors, stream: int) -> torch.Tensor:
    """`ternary_linear` by the GPU backend, on a CUDA stream.

    The result is torch's memory, as a CUDA graph of torch must know what lives on after it.
    """
    from gpu import matmul, on_stream, to_device  # needs CuPy and a device

    y = x.new_empty(x.shape[0], packed.ends[-1])
    # The backend works on the current device, which PyTorch does not set for operations in Python.
    with torch.cuda.device_of(x), on_stream(stream):
        layout = _layout_of(packed)
        x = x.detach().contiguous()  # DLPack takes nothing that has a gradient
        bits = to_device(_bits(x))
        if not matmul.prefers_unpacked(bits, layout):
            matmul.multiply(bits, layout, to_device(_bits(y)))
            return y
        begin = 0
        for array in matmul.unpacked(bits, layout):
            weights = torch.from_dlpack(array).view(x.dtype)
            end = begin + len(weights)
            torch.mm(x, weights.T, out=y[:, begin:end])
            begin = end
            del array, weights  # one workspace at a time
    return y


# By words. To wrap a layout's tensors and to check them takes the host longer than a product of few tokens
# takes the device.
_layouts = WeakTensorKeyDictionary()


def _layout_of(packed: PackedTensors) -> Any:
    """The backend's layout, which lives as long as the words do, or until a tensor is another one."""
    from gpu import matmul, to_device

    _, _, order, row_factors, block_factors, ends, *sizes = packed
    places = [None if tensor is None else (tensor.data_ptr(), tensor.shape) for tensor in packed[:5]]
    made_of = (*places, *ends, *sizes)
    known, layout = _layouts.get(packed.words, (None, None))
    if known != made_of:
        layout = matmul.Layout(
            # Through an alias, as a layout that held the words themselves would never be dropped.
            to_device(packed.words.detach()).view("uint32"),
            _numbers(to_device(packed.grid)),
            to_device(order).view(f"uint{8 * order.element_size()}"),
            tuple(ends),
            packed.columns,
            packed.block_size,
            None if row_factors is None else to_device(row_factors).view("float16"),
            None if block_factors is None else _numbers(to_device(block_factors)),
            packed.in_float16,
        )
        _layouts[packed.words] = made_of, layout
    return layout


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _numbers(bits: Any) -> Any:
    """Pairs of numbers (..., 2) of the backend's array of integers that hold them."""
    return bits.view(PAIRS[bits.dtype.name]).reshape(*bits.shape, 2)
