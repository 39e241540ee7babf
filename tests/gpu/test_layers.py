"""TernaryLinear on packed trits: the operation of torch, its fallback, and what it must not change."""

import copy

import numpy as np
import pytest
import torch

from gpu.device import to_device, to_host
from gpu.matmul import Packed, multiply
from harness.backends import load_backend
from harness.compute import compute_for
from harness.linear import TernaryLinear
from harness.ops import ternary_linear
from harness.throughput import fill

SHAPES = [(5, 3, 64), (40, 300, 128), (17, 577, 64), (130, 256, 256)]

# Of the largest output: products and sums of the dense weights, rounded to this type, against exact ones.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def backend():
    return load_backend("gpu")


@pytest.fixture(scope="module")
def device(backend):
    return compute_for(backend).device


def layer_of(rows, columns, block_size, device, permuted=True, bias=False, grid="float16"):
    torch.manual_seed(rows)
    layer = TernaryLinear(columns, rows, block_size, grid, permuted, bias, torch.float32).to(device)
    if grid == "int8":
        layer.scale.random_(-127, 128), layer.shift.random_(-127, 128)
        for factor in (layer.row_factor, layer.scale_factor, layer.shift_factor):
            factor.uniform_(0.01, 0.1)
        other = TernaryLinear(columns, rows, block_size, "float16", permuted, bias, torch.float32).to(device)
        fill(other)
        layer.trits.copy_(other.trits)
        layer.permutation.copy_(other.permutation)
    else:
        fill(layer)
        layer.scale.mul_(torch.randn(layer.scale.shape, device=device).half())
    if bias:
        layer.bias.data.normal_()
    return layer


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_packed_products_are_those_of_the_dense_weights(backend, device, shape, dtype, tokens):
    layer = layer_of(*shape, device)
    x = torch.randn(tokens, shape[1], device=device).to(dtype)
    expected = x.double() @ layer.dequantize().double().T
    layer.use_kernels(backend)
    y = layer(x)
    assert y.dtype == dtype
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("options", [{"permuted": False}, {"bias": True}, {"grid": "int8"}], ids=str)
def test_without_permutation_with_bias_and_with_grids_in_8_bits(backend, device, options):
    layer = layer_of(24, 300, 128, device, **options)
    x = torch.randn(2, 7, 300, device=device)
    expected = torch.nn.functional.linear(x.double(), layer.dequantize().double())
    if layer.bias is not None:
        expected += layer.bias.double()
    layer.use_kernels(backend)
    error = (layer(x).double() - expected).abs().max() / expected.abs().max()
    assert layer(x).shape == (2, 7, 24)
    assert error <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_plain_torch_walks_the_layout_of_the_kernels(backend, device, dtype):
    layer = layer_of(33, 577, 64, device)
    layer.use_kernels(backend)
    x = torch.randn(4, 577, dtype=dtype)
    arguments = [tensor.cpu() for tensor in (layer.words, layer.grid, layer.order)]
    plain = ternary_linear(x, *arguments, 64)
    words, grid, order = (to_device(tensor.to(device)) for tensor in arguments)
    layout = Packed(words.view(np.uint32), grid, order.view(np.uint32), 64)
    bits = x.view(torch.int16) if dtype == torch.bfloat16 else x
    y = torch.from_numpy(np.ascontiguousarray(to_host(multiply(to_device(bits.to(device)), layout))))
    difference = (plain.double() - y.view(dtype).double()).abs().max() / plain.double().abs().max()
    assert difference <= TOLERANCE[dtype]


def test_the_operation_can_be_traced_and_compiled(backend, device):
    layer = layer_of(16, 300, 128, device)
    layer.use_kernels(backend)
    x = torch.randn(3, 300, device=device)
    arguments = (x, layer.words, layer.grid, layer.order, 128)
    torch.library.opcheck(ternary_linear, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("grid", ["float16", "int8"])
def test_kernels_change_nothing_that_is_saved(backend, device, grid):
    layer = layer_of(16, 300, 128, device, grid=grid)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(3, 300, device=device)
    layer.use_kernels(backend)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    layer.to(torch.bfloat16)
    assert layer.grid.dtype == {"float16": torch.float16, "int8": torch.float64}[grid]
    assert torch.equal(layer(x), y)
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    layer.keep_dense(True)
    assert layer.words is None


def test_a_cuda_graph_replays_the_product(backend, device):
    if device.type != "cuda":
        pytest.skip("the host has no graphs")
    layer = layer_of(256, 512, 128, device)
    layer.use_kernels(backend)
    x = torch.randn(1, 512, device=device, dtype=torch.float16)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    other = torch.randn_like(x)
    x.copy_(other)
    graph.replay()
    torch.testing.assert_close(y, layer(other), rtol=0, atol=0)
