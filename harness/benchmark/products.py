"""Time products with ternary and dense matrices in the shapes of real models."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from torch import nn

from harness.backends import load_backend
from harness.benchmark import ggml
from harness.benchmark.shapes import SHAPES
from harness.comparison.speed import fill
from harness.compute import Compute, dtype_name, share_memory
from harness.quantize.options import RECIPES
from harness.ternary.kernels.launches import share_launch, share_on_host
from harness.ternary.linear import TernaryLinear

# More than twice the L2 cache of an H200, so that every product reads its weights from memory.
ROTATED_BYTES = 128e6
COPIED_BYTES = 1e9
REPEATS = 20


@dataclass(frozen=True)
class Matrices:
    """Linear layers that read the same input, and their role in the model."""

    name: str
    rows: tuple[int, ...]
    columns: int


def matrices_of(shape: str) -> list[Matrices]:
    """List the distinct matrices of a decoder layer, alone and in groups that read the same input.

    `shape` is one of `harness.benchmark.shapes.SHAPES`.
    """
    size = SHAPES[shape]
    hidden, intermediate, narrow = size.hidden, size.intermediate, size.head_width * size.groups
    found = [Matrices("q and o", (hidden,), hidden)]
    if narrow != hidden:
        found.append(Matrices("k and v", (narrow,), hidden))
    return [
        *found,
        Matrices("gate and up", (intermediate,), hidden),
        Matrices("down", (hidden,), intermediate),
        Matrices("q, k, v together", (hidden, narrow, narrow), hidden),
        Matrices("gate, up together", (intermediate, intermediate), hidden),
    ]


def product_speed(
    shape: str, compute: Compute, batches: list[int], dtype: torch.dtype, recipe: str = "best"
) -> dict[str, Any]:
    """Time the product with every matrix of a layer, at every batch size, in several ways.

    ``packed`` uses the packed kernels and ``dense`` dense weights. On a GPU, ``dequantized`` dequantizes at
    every call, and ``gemlite`` is gemlite's 2-bit product of the same weights, if gemlite is installed. On
    the host, ``float32`` uses dense weights and activations in float32, ``tq2_0`` is ggml's product with such
    weights if xllamacpp is installed, and the ways take turns.
    Matrices that read the same input are also timed as a group: ``packed`` is then a single launch,
    ``separate`` one launch per matrix; the other ways run one matrix after the other.

    Parameters
    ----------
    shape : str
        One of `harness.benchmark.shapes.SHAPES`.
    compute : Compute
        Device that runs the products; on a GPU, inside a CUDA graph.
    batches : list of int
        Numbers of rows of the activations.
    dtype : torch.dtype
        dtype of activations and dense weights.
    recipe : str
        The recipe whose block size, grid and order the weights have.

    Returns
    -------
    dict
        ``copy_gb_s``, the bandwidth of a copy in the same run, counting reads and writes; and ``products``:
        for every matrix and batch, the microseconds of each way, the share of that bandwidth which
        ``packed`` reaches by the bytes it reads, and its speedup over ``dense``.
    """
    bandwidth = _copy_bandwidth(compute)
    rows = []
    for matrices in matrices_of(shape):
        layers = _rotated(matrices, compute, dtype, recipe)
        products = [_ways(group, compute) for group in layers]
        read = sum(_bytes_read(layer) for layer in layers[0])
        for batch in batches:
            x = torch.randn(batch, matrices.columns, dtype=dtype, device=compute.device)
            calls = {way: [partial(ways[way], x) for ways in products] for way in products[0]}
            seconds = _seconds(calls, compute)
            rows.append(
                {
                    "matrix": matrices.name,
                    "rows": sum(matrices.rows),
                    "columns": matrices.columns,
                    "batch": batch,
                    **{f"{way}_us": round(1e6 * spent, 3) for way, spent in seconds.items()},
                    "share_of_copy_bandwidth": round(
                        (read + x.numel() * x.element_size()) / seconds["packed"] / bandwidth, 4
                    ),
                    "times_faster_than_dense": round(seconds["dense"] / seconds["packed"], 4),
                }
            )
    return {
        "shape": shape,
        "dtype": dtype_name(dtype),
        "recipe": recipe,
        "device": compute.describe(),
        "copy_gb_s": round(bandwidth / 1e9, 2),
        "products": rows,
    }


def gemlite_product(layer: TernaryLinear) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make gemlite's product with the same weights: 2-bit codes t + 1, a float zero point per block.

    gemlite has no permutation, so the columns stay in quantization order.

    Parameters
    ----------
    layer : TernaryLinear
        A layer on a CUDA GPU; its number of columns must be a multiple of the block size.

    Returns
    -------
    callable
        Maps activations (tokens, m) to (tokens, n).
    """
    helper = importlib.import_module("gemlite.helper")
    matrix = layer.matrix()
    alpha, mu = matrix.grid()
    codes = (matrix.trits + 1).to(torch.uint8)
    maker = helper.A16Wn(device=str(codes.device), dtype=layer.weight_dtype)
    scales, zeros = (values.to(layer.weight_dtype) for values in (alpha, 1 - mu / alpha))
    return maker.from_weights(codes, scales, zeros, 2, layer.block_size)


def _rotated(
    matrices: Matrices, compute: Compute, dtype: torch.dtype, recipe: str
) -> list[list[TernaryLinear]]:
    """Make enough random copies of the layers to exceed the L2 cache."""
    size = 2.25 / 8 * sum(matrices.rows) * matrices.columns
    count = max(2, int(ROTATED_BYTES / size)) if compute.device.type == "cuda" else 2

    config = RECIPES[recipe].config
    permuted = config.reorder != "none"

    def layer_of(rows: int) -> TernaryLinear:
        layer = TernaryLinear(matrices.columns, rows, config.block_size, config.grid, permuted, False, dtype)
        fill(layer.to(compute.device))
        return layer

    return [[layer_of(rows) for rows in matrices.rows] for _ in range(count)]


def _ways(layers: list[TernaryLinear], compute: Compute) -> dict[str, Callable[[torch.Tensor], Any]]:
    """Return every available way to compute the products of layers that read the same input."""
    alone, weights = copy.deepcopy(layers), [layer.dequantize() for layer in layers]
    ways: dict[str, Callable[[torch.Tensor], Any]] = {
        "packed": lambda x: [layer(x) for layer in layers],
        "dense": lambda x: [nn.functional.linear(x, weight) for weight in weights],
    }
    if compute.device.type != "cuda":
        wide = [weight.float() for weight in weights]
        ways["float32"] = lambda x: [nn.functional.linear(x.float(), weight) for weight in wide]
        if len(layers) > 1:
            for layer in alone:
                share_on_host([layer])
            ways["separate"] = lambda x: [layer(x) for layer in alone]
        if ggml.is_installed() and layers[0].in_features % ggml.BLOCK == 0:
            rival = cache(lambda i, tokens: ggml.tq2_0_product(wide[i].numpy(), tokens))
            ways["tq2_0"] = lambda x: [rival(i, len(x))(x) for i in range(len(wide))]
        share_on_host(layers)
        return ways
    ways["dequantized"] = lambda x: [layer(x) for layer in alone]
    if importlib.util.find_spec("gemlite"):
        theirs = [gemlite_product(layer) for layer in layers]
        ways["gemlite"] = lambda x: [product(x) for product in theirs]
    backend = load_backend("gpu")
    share_memory(backend)
    if len(layers) > 1:
        separate = copy.deepcopy(alone)
        for layer in separate:
            share_launch([layer], backend)
        ways["separate"] = lambda x: [layer(x) for layer in separate]
    share_launch(layers, backend)
    return ways


def _bytes_read(layer: TernaryLinear) -> int:
    tensors = layer.stored().values() if layer.packed is None else layer.packed.buffers()
    share = 1 if layer.packed is None else len(layer.packed.ends)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) // share


@torch.no_grad()
def _seconds(calls: Mapping[str, Sequence[Callable[[], Any]]], compute: Compute) -> dict[str, float]:
    """Median seconds per call of every way; every call of a way has its own weights."""
    for call in (call for several in calls.values() for call in several[:3]):  # compile and select kernels
        call()
    compute.wait()
    if compute.device.type == "cuda":
        return {way: _seconds_on_device(several) for way, several in calls.items()}
    spent: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(REPEATS):
        # In turns, as the host may be busy with something else for a while.
        for way, several in calls.items():
            spent[way] += [_clocked(call) for call in several]
    return {way: median(clocked) for way, clocked in spent.items()}


def _seconds_on_device(calls: Sequence[Callable[[], Any]]) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    spent = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return median(spent)


def _clocked(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _copy_bandwidth(compute: Compute) -> float:
    """Bytes per second of a copy, counting reads and writes."""
    size = int(COPIED_BYTES if compute.device.type == "cuda" else COPIED_BYTES / 20)
    # Random bytes: zeros may be faster to copy.
    source = torch.empty(size, dtype=torch.uint8, device=compute.device).random_(0, 256)
    target = torch.empty_like(source)
    return 2 * size / _seconds({"copy": [lambda: target.copy_(source)] * 3}, compute)["copy"]
