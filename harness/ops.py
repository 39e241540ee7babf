"""The packed product as an operation of torch, for ``torch.compile`` and CUDA graphs.

``torch.ops.pt2_llm.ternary_linear`` takes what `gpu.matmul.lay_out` makes. On a CUDA device it runs the
kernels of `gpu`; elsewhere plain torch unpacks the same layout, which is slow and the kernels' reference
in tests.
"""

from __future__ import annotations

import torch

# Digits in a word of the layout.
WORD = 16


@torch.library.custom_op("pt2_llm::ternary_linear", mutates_args=())
def ternary_linear(
    x: torch.Tensor, words: torch.Tensor, grid: torch.Tensor, permutation: torch.Tensor, block_size: int
) -> torch.Tensor:
    """``x @ W_hat.T`` with the packed weights (n, m).

    Parameters
    ----------
    x : (tokens, m) tensor
        Activations.
    words : (n, 16 ceil(m / 256)) int32
        Trits, as `gpu.matmul.Packed` describes; int32 because torch has few operations on uint32.
    grid : (n, blocks, 2) float16 or float64
        alpha and mu.
    permutation : (m,) int32
        Original column of every trit.
    block_size : int
        Columns in a block.

    Returns
    -------
    (tokens, n) tensor of the type of x
    """
    n, m = words.shape[0], x.shape[1]
    # Four lanes of a warp share a chunk, and their words are interleaved.
    ordered = words.view(n, -1, 4, 4).transpose(2, 3).reshape(n, -1, 1)
    digits = ordered >> torch.arange(0, 2 * WORD, 2, device=words.device) & 3
    trits = digits.view(n, -1)[:, :m] - 1
    block = torch.arange(m, device=words.device) // block_size
    alpha, mu = grid[:, block].float().unbind(-1)
    weight = torch.empty(n, m, device=words.device)
    weight[:, permutation.long()] = alpha * trits + mu
    return (x.float() @ weight.T).to(x.dtype)


@ternary_linear.register_fake
def _(
    x: torch.Tensor, words: torch.Tensor, grid: torch.Tensor, permutation: torch.Tensor, block_size: int
) -> torch.Tensor:
    return x.new_empty(x.shape[0], words.shape[0])


@ternary_linear.register_kernel("cuda")
def _(
    x: torch.Tensor, words: torch.Tensor, grid: torch.Tensor, permutation: torch.Tensor, block_size: int
) -> torch.Tensor:
    import gpu.matmul as packed  # needs CuPy and a device
    from gpu import on_stream, to_device

    bits = x.contiguous()
    if x.dtype == torch.bfloat16:
        bits = bits.view(torch.int16)
    with on_stream(torch.cuda.current_stream(x.device).cuda_stream):
        layout = packed.Packed(
            to_device(words).view("uint32"),
            to_device(grid),
            to_device(permutation).view("uint32"),
            block_size,
        )
        y = torch.from_dlpack(packed.multiply(to_device(bits), layout))
    return y.view(x.dtype)
