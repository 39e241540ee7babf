"""The packed product as a custom torch operation, for ``torch.compile`` and CUDA graphs.

``torch.ops.pt2_llm.ternary_linear`` takes the tensors of one of two layouts, told apart by their words. On a
CUDA GPU it launches the kernels of `gpu`, for `harness.ternary.kernels.tensors.PackedTensors`; on a CPU the
kernel of `harness.cpu`, for `harness.ternary.kernels.host.HostTensors`. In all other cases plain torch
unpacks the same tensors; this is slow, and serves as the reference for the kernels in tests.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from harness.ternary.kernels.host import HostTensors, multiply_on_host
from harness.ternary.kernels.tensors import PAIRS, PackedTensors


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
    """Compute ``x @ W_hat.T`` for one matrix, or for several matrices side by side.

    Parameters
    ----------
    x : (tokens, m) tensor
        Activations.
    words, grid, permutation, row_factors, block_factors, ends, block_size, columns, in_float16
        As in `PackedTensors` or `HostTensors`.

    Returns
    -------
    (tokens, n) tensor in the dtype of x
    """
    packed = _named(
        (words, grid, permutation, row_factors, block_factors, ends, block_size, columns, in_float16)
    )
    if has_kernel_on_host(packed, x):
        return multiply_on_host(x, packed)
    return _multiply_unpacked(x, packed)


def has_kernel_on_host(packed: PackedTensors | HostTensors, x: torch.Tensor) -> TypeGuard[HostTensors]:
    """Whether the CPU's kernel computes a product: it takes its own layout, and sums in float32."""
    return isinstance(packed, HostTensors) and x.device.type == "cpu" and x.dtype != torch.float64


def _named(weights: tuple[Any, ...]) -> PackedTensors | HostTensors:
    """The arguments of the operation after x, by their names in the layout that they have."""
    kind = HostTensors if weights[0].dtype == torch.uint8 else PackedTensors
    return kind._make(weights)


def _unpacked(packed: PackedTensors | HostTensors, dtype: torch.dtype) -> torch.Tensor:
    """Dense weights of all parts, (n, m)."""
    parts = (packed.part(index) for index in range(len(packed.ends)))
    return torch.cat([part.dequantize(packed.block_size, dtype) for part in parts])


def _multiply_unpacked(x: torch.Tensor, packed: PackedTensors | HostTensors) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ _unpacked(packed, wide).T).to(x.dtype)


def _keep_weights(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:6])
    ctx.sizes = inputs[6:]


def _gradient(ctx: Any, of_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradient with respect to x; trits have none."""
    saved = ctx.saved_tensors  # read once: gradient checkpointing gives them once
    packed = _named((*saved, *ctx.sizes))
    wide = torch.promote_types(of_output.dtype, torch.float32)
    of_x = (of_output.to(wide) @ _unpacked(packed, wide)).to(of_output.dtype)
    return of_x, *[None] * (len(saved) + len(ctx.sizes))


ternary_linear.register_autograd(_gradient, setup_context=_keep_weights)


@ternary_linear.register_fake
def _(x: torch.Tensor, *weights: Any) -> torch.Tensor:
    packed = _named(weights)
    torch._check(x.shape[1] == packed.columns, lambda: f"x has shape {x.shape}, not {packed.columns} columns")
    return x.new_empty(x.shape[0], packed.ends[-1])


@ternary_linear.register_kernel("cuda")
def _(x: torch.Tensor, *weights: Any) -> torch.Tensor:
    packed = _named(weights)
    if isinstance(packed, HostTensors):
        return _multiply_unpacked(x, packed)
    return multiply_by_kernels(x, packed, torch.cuda.current_stream(x.device).cuda_stream)


def multiply_by_kernels(x: torch.Tensor, packed: PackedTensors, stream: int) -> torch.Tensor:
    """Run `ternary_linear` with the kernels of the GPU backend, on a CUDA stream.

    torch allocates the result, so that torch's CUDA graphs track its lifetime.
    """
    from gpu import matmul, on_stream, to_device  # needs CuPy and a device

    y = x.new_empty(x.shape[0], packed.ends[-1])
    # The backend runs on the current device, which PyTorch does not set for Python operations.
    with torch.cuda.device_of(x), on_stream(stream):
        layout = _layout_of(packed)
        x = x.detach().contiguous()  # DLPack refuses tensors that require gradients
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


# Layouts by their words. For few tokens, wrapping and checking the tensors of a layout on the host takes
# longer than the product on the device.
_layouts = WeakTensorKeyDictionary()


def _layout_of(packed: PackedTensors) -> Any:
    """Return the backend's layout, cached until the words are freed or a tensor is replaced."""
    from gpu import matmul, to_device

    _, _, order, row_factors, block_factors, ends, *sizes = packed
    places = [None if tensor is None else (tensor.data_ptr(), tensor.shape) for tensor in packed[:5]]
    key = (*places, *ends, *sizes)
    cached_key, layout = _layouts.get(packed.words, (None, None))
    if cached_key != key:
        layout = matmul.Layout(
            # An alias: a layout that referenced the key itself would keep the cache entry alive forever.
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
        _layouts[packed.words] = key, layout
    return layout


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _numbers(bits: Any) -> Any:
    """View a backend array of integers as the pairs of numbers (..., 2) that it holds."""
    return bits.view(PAIRS[bits.dtype.name]).reshape(*bits.shape, 2)
