"""Microseconds of single products with ternary and dense matrices of real models' shapes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from harness.backends import load_backend
from harness.compute import Compute
from harness.linear import LAYOUT, TernaryLinear
from harness.scale import SHAPES
from harness.throughput import DTYPE, fill

# Larger than the L2 cache of an H200 twice over, so that weights come from memory at every product.
ROTATED_BYTES = 128e6
COPIED_BYTES = 1e9
REPEATS = 20


@dataclass(frozen=True)
class Matrix:
    """A linear layer's shape, and what it is in the model."""

    name: str
    rows: int
    columns: int


def matrices_of(shape: str) -> list[Matrix]:
    """The different matrices of a decoder layer of one of `harness.scale.SHAPES`."""
    _, hidden, intermediate, _, heads, groups, _ = SHAPES[shape]
    found = [Matrix("q and o", hidden, hidden)]
    if groups != heads:
        found.append(Matrix("k and v", hidden // heads * groups, hidden))
    return [*found, Matrix("gate and up", intermediate, hidden), Matrix("down", hidden, intermediate)]


def product_speed(shape: str, compute: Compute, batches: list[int]) -> dict[str, Any]:
    """Every matrix of a layer at every batch: packed, dense, and dequantized at every call.

    Parameters
    ----------
    shape : str
        One of `harness.scale.SHAPES`.
    compute : Compute
        Where they run; on a device inside a CUDA graph.
    batches : list of int
        Rows of the activations.

    Returns
    -------
    dict
        ``copy_gb_s``, the bandwidth of a copy in the same run, reads and writes counted; and ``products``,
        for every matrix and batch the microseconds of each way, what of that bandwidth the packed one
        reaches by the bytes it reads, and its ratio to the dense one.
    """
    bandwidth = _copy_bandwidth(compute)
    rows = []
    for matrix in matrices_of(shape):
        layers = _rotated(matrix, compute)
        dense = [layer.dequantize() for layer in layers]
        for batch in batches:
            x = torch.randn(batch, matrix.columns, dtype=DTYPE, device=compute.device)
            ways: dict[str, list[Callable[[], Any]]] = {
                "packed": [_call(layer, x) for layer in layers],
                "dense": [_call(nn.functional.linear, x, weight) for weight in dense],
                "dequantized": [_call(_dequantized, x, layer) for layer in layers],
            }
            seconds = {way: _seconds(calls, compute) for way, calls in ways.items()}
            read = _bytes_read(layers[0]) + x.numel() * x.element_size()
            rows.append(
                {
                    "matrix": matrix.name,
                    "rows": matrix.rows,
                    "columns": matrix.columns,
                    "batch": batch,
                    **{f"{way}_us": round(1e6 * spent, 3) for way, spent in seconds.items()},
                    "share_of_copy_bandwidth": round(read / seconds["packed"] / bandwidth, 4),
                    "times_faster_than_dense": round(seconds["dense"] / seconds["packed"], 4),
                }
            )
    return {
        "shape": shape,
        "dtype": str(DTYPE).removeprefix("torch."),
        "device": compute.describe(),
        "copy_gb_s": round(bandwidth / 1e9, 2),
        "products": rows,
    }


def _rotated(matrix: Matrix, compute: Compute) -> list[TernaryLinear]:
    """As many random layers as do not fit in a cache; with kernels where there is a device."""
    size = 2.25 / 8 * matrix.rows * matrix.columns
    count = max(2, int(ROTATED_BYTES / size)) if compute.device.type == "cuda" else 2
    layers = []
    for _ in range(count):
        layer = TernaryLinear(matrix.columns, matrix.rows, 128, "float16", True, False, DTYPE)
        layer.to(compute.device)
        fill(layer)
        if compute.device.type == "cuda":
            layer.use_kernels(load_backend("gpu"))
        layers.append(layer)
    return layers


def _bytes_read(layer: TernaryLinear) -> int:
    names = LAYOUT if layer.words is not None else ("trits", "scale", "shift", "permutation")
    return sum(getattr(layer, name).numel() * getattr(layer, name).element_size() for name in names)


def _dequantized(x: torch.Tensor, layer: TernaryLinear) -> torch.Tensor:
    return nn.functional.linear(x, layer.dequantize())


def _call(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


@torch.no_grad()
def _seconds(calls: list[Callable[[], Any]], compute: Compute) -> float:
    """Median seconds of a call, each of which has weights of its own."""
    for call in calls[:3]:  # compiles, and picks kernels
        call()
    compute.wait()
    if compute.device.type != "cuda":
        return median(_clocked(call, compute) for call in calls for _ in range(3))
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


def _clocked(call: Callable[[], Any], compute: Compute) -> float:
    begin = time.perf_counter()
    call()
    compute.wait()
    return time.perf_counter() - begin


def _copy_bandwidth(compute: Compute) -> float:
    """Bytes a second of a copy, read and written."""
    size = int(COPIED_BYTES if compute.device.type == "cuda" else COPIED_BYTES / 20)
    source = torch.zeros(size, dtype=torch.uint8, device=compute.device)
    target = torch.empty_like(source)
    return 2 * size / _seconds([lambda: target.copy_(source)] * 3, compute)
