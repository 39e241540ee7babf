"""The packed product as an operation of torch: by the kernels, by its fallback, traced and in graphs."""

import copy
import gc
import weakref
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

from gpu import matmul
from gpu.device import STANDIN, xp
from gpu.kernels import choice, dense
from gpu.kernels.sources import Limits
from gpu.layout import lay_out
from harness.ternary.kernels.launches import share_launch
from harness.ternary.kernels.operation import multiply_by_kernels, ternary_linear
from tests.gpu.emulation import COMPILER, Emulator
from tests.gpu.packed_layers import TOLERANCE, layer_of, off

SHAPES = [(5, 3, 64), (40, 300, 128), (17, 577, 64), (130, 256, 256), (9, 1100, 512)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 20, choice.UNPACKED_TOKENS])
def test_packed_products_are_those_of_the_dense_weights(backend, device, shape, dtype, tokens):
    layer = layer_of(*shape, device)
    x = torch.randn(tokens, shape[1], device=device).to(dtype)
    expected = x.double() @ layer.dequantize().double().T
    share_launch([layer], backend)
    y = layer(x)
    assert y.dtype == dtype
    assert off(y, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("options", [{"permuted": False}, {"bias": True}, {"grid": "int8"}], ids=str)
def test_without_permutation_with_bias_and_with_grids_in_8_bits(backend, device, options):
    layer = layer_of(24, 300, 128, device, **options)
    x = torch.randn(2, 7, 300, device=device)
    expected = torch.nn.functional.linear(x.double(), layer.dequantize().double())
    if layer.bias is not None:
        expected += layer.bias.double()
    share_launch([layer], backend)
    assert layer(x).shape == (2, 7, 24)
    assert off(layer(x), expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("grid", ["float16", "int8"])
@pytest.mark.parametrize("block_size", [64, 512])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_plain_torch_walks_the_layout_of_the_kernels(backend, device, dtype, block_size, grid):
    """The backend through DLPack, on the tensors of the host where it has no device."""
    layers = [layer_of(rows, 577, block_size, device, grid=grid) for rows in (33, 7)]
    share_launch(layers, backend)
    x = torch.randn(4, 577, dtype=dtype, device=device)
    packed = layers[0].packed.tensors()
    host = [tensor.cpu() if isinstance(tensor, torch.Tensor) else tensor for tensor in packed]
    plain = ternary_linear(x.cpu(), *host)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    y = multiply_by_kernels(x.requires_grad_(), packed, stream)
    assert y.dtype == plain.dtype
    assert off(y.cpu(), plain) <= TOLERANCE[dtype]


def test_a_layout_is_made_once_and_anew_for_other_tensors(backend, device, monkeypatch):
    layer, other = (layer_of(16, 300, 128, device, grid="int8") for _ in range(2))
    x = torch.randn(2, 300, device=device)
    expected = other(x)
    for one in (layer, other):
        share_launch([one], backend)
    made, kind = [], matmul.Layout

    def make(*of):
        found = kind(*of)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(matmul, "Layout", make)
    packed, others = layer.packed.tensors(), other.packed.tensors()
    first = multiply_by_kernels(x, packed, 0)
    torch.testing.assert_close(multiply_by_kernels(x, packed, 0), first)
    # What is loaded into the tensors is seen.
    for mine, theirs in zip(packed[:5], others[:5], strict=True):
        mine.copy_(theirs)
    torch.testing.assert_close(multiply_by_kernels(x, packed, 0), expected)
    assert len(made) == 1
    # Two columns change places, in a tensor of its own and in x.
    order = packed.permutation.clone()
    order[0, :2] = packed.permutation[0, :2].flip(0)
    two = order[0, :2].long()
    x[:, two] = x[:, two.flip(0)]
    y = multiply_by_kernels(x, packed._replace(permutation=order), 0)
    torch.testing.assert_close(y, expected)
    assert len(made) == 2
    del packed, layer, mine
    gc.collect()
    assert [reference() for reference in made] == [None, None]


def test_activations_of_another_width_are_refused(backend, device):
    """290 columns are as many chunks as 300, and 600 numbers are two rows of 300."""
    layer = layer_of(16, 300, 128, device)
    share_launch([layer], backend)
    packed = layer.packed.tensors()
    for shape in ((2, 290), (4, 150)):
        x = torch.zeros(shape, device=device)
        with pytest.raises((RuntimeError, ValueError), match="shape"):
            layer(x)
        with pytest.raises(ValueError, match=r"x has shape .* expected \(\d, 300\)"):
            multiply_by_kernels(x, packed, 0)
        with pytest.raises(RuntimeError, match="not 300 columns"):
            ternary_linear(x.to("meta"), *(t.to("meta") if torch.is_tensor(t) else t for t in packed))


def test_the_backend_works_on_the_device_of_the_tensors(backend, device, monkeypatch):
    """It takes the current one, which may be another; few machines have two, so here it is noted."""
    entered = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext(entered.append(tensor.device)))
    layer = layer_of(16, 300, 128, device)
    share_launch([layer], backend)
    share_launch([layer], backend)  # whose tensors are those of the layout
    multiply_by_kernels(torch.zeros(2, 300, device=device), layer.packed.tensors(), 0)
    assert entered == 3 * [device]


@pytest.fixture
def unpacked(monkeypatch, tmp_path):
    """Weights are unpacked from two tokens on; by emulated kernels where there is no device."""
    table = [kernel._replace(least=2) if kernel.name == "dense" else kernel for kernel in choice.TABLE]
    monkeypatch.setattr(choice, "TABLE", table)
    if not STANDIN:
        return
    if COMPILER is None:
        pytest.skip("needs a device, or g++ to emulate one")
    monkeypatch.setattr(matmul, "_limits", lambda x: Limits(90, 99 * 1024, 3))
    monkeypatch.setattr(dense, "unpack", partial(dense.unpack, launch=Emulator(tmp_path)))


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("grid", ["float16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_by_unpacked_weights(backend, device, dtype, grid, monkeypatch):
    layers = [layer_of(rows, 577, 64, device, grid=grid) for rows in (33, 7, 40)]
    x = torch.randn(5, 577, device=device).to(dtype)
    expected = torch.cat([x.double() @ layer.dequantize().double().T for layer in layers], dim=1)
    share_launch(layers, backend)
    packed = layers[0].packed.tensors()
    workspaces = []

    def unpack(*arguments):
        assert not any(workspace() is not None for workspace in workspaces)
        weights = made(*arguments)
        workspaces.append(weakref.ref(weights))
        return weights

    made = dense.unpack
    monkeypatch.setattr(dense, "unpack", unpack)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    y = multiply_by_kernels(x, packed, stream)
    assert len(workspaces) == 3
    assert off(y, expected) <= TOLERANCE[dtype]
    for bad in (float("nan"), float("inf")):
        x[1, 300] = bad
        dirty = multiply_by_kernels(x, packed, stream)
        assert not dirty[1].isfinite().any()
        assert torch.equal(dirty[[0, 2, 3, 4]], y[[0, 2, 3, 4]])


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize(("mu", "fits"), [(0.0, True), (-1.0, False)])
def test_weights_beyond_float16_are_not_unpacked_in_it(backend, device, mu, fits, monkeypatch):
    layer = layer_of(33, 577, 64, device)
    layer.scale.fill_(65504), layer.shift.fill_(65504 * mu)
    share_launch([layer], backend)
    packed = layer.packed.tensors()
    assert packed.in_float16 == fits
    ways = []
    monkeypatch.setattr(matmul, "unpacked", lambda x, layout: ways.append("unpacked") or ())
    monkeypatch.setattr(matmul, "multiply", lambda x, layout, y: ways.append("packed"))
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    for dtype in (torch.float16, torch.bfloat16):
        multiply_by_kernels(torch.zeros(5, 577, device=device, dtype=dtype), packed, stream)
    assert ways == ["unpacked" if fits else "packed", "unpacked"]


def test_rows_that_do_not_fit_into_shared_memory_are_not_unpacked(monkeypatch):
    grids = xp.ones((2, 1, 3), np.float16)
    layout = lay_out(xp.zeros((1, 60), np.uint8), *grids, xp.arange(300), 128)
    x = xp.zeros((choice.UNPACKED_TOKENS, 300), np.float16)
    for shared, fits in ((1200, False), (1300, True)):  # 300 columns of 4 bytes are 1200, and there are gaps
        monkeypatch.setattr(matmul, "_limits", lambda x, shared=shared: Limits(90, shared, 1))
        assert matmul.prefers_unpacked(x, layout) == fits
    assert not matmul.prefers_unpacked(x[1:], layout)


@pytest.mark.parametrize("how", ["aot_eager", "inductor"])
def test_the_operation_can_be_traced_and_compiled(backend, device, how):
    layers = [layer_of(rows, 300, 128, device) for rows in (16, 8)]
    share_launch(layers, backend)
    x = torch.randn(3, 300, device=device)
    arguments = (x, *layers[0].packed.tensors())
    torch.library.opcheck(ternary_linear, arguments, test_utils=("test_schema", "test_faketensor"))

    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = layers

        def forward(self, x):
            return self.gate(2 * x).sum() * self.up(3 * x) + self.up(x) - self.gate(x).sum()

    model = Gated()
    compiled = torch.compile(model, backend=how, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled(x + 1), model(x + 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [2**15 + 300, 2**16 + 300])
def test_columns_that_a_signed_or_any_two_bytes_cannot_name(backend, device, columns):
    layer = layer_of(2, columns, 1024, device)
    x = torch.randn(3, columns, device=device)
    expected = torch.nn.functional.linear(x, layer.dequantize())
    order = layer.permutation.clone()
    share_launch([layer], backend)
    assert off(layer(x), expected) <= 1e-5
    assert torch.equal(layer.stored()["permutation"], order)


def test_a_cuda_graph_replays_the_product(backend, device):
    if device.type != "cuda":
        pytest.skip("the host has no graphs")
    layer = layer_of(256, 512, 128, device)
    packed = copy.deepcopy(layer)
    share_launch([packed], backend)
    for used, tokens in ((packed, 1), (packed, 20), (packed, choice.UNPACKED_TOKENS), (layer, 1)):
        x = torch.randn(tokens, 512, device=device, dtype=torch.float16)
        used(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = used(x)
        other = torch.randn_like(x)
        x.copy_(other)
        graph.replay()
        torch.testing.assert_close(y, used(other), rtol=0, atol=0)
