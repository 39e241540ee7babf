"""Layers on packed trits: what they share, and what kernels must not change."""

import copy

import pytest
import torch

from harness.ternary.kernels.launches import share_launch, use_kernels
from harness.ternary.kernels.operation import ternary_linear
from tests.gpu.packed_layers import TOLERANCE, layer_of, off


def test_what_a_layer_gives_is_as_of_a_dense_one(backend, device):
    """Its type with a bias of another, exact numbers, changes in place, and weights it cannot take."""
    layers = [layer_of(rows, 300, 128, device, bias=True) for rows in (16, 8)]
    stored = layers[0].state_dict()
    x = torch.randn(3, 300, device=device)
    exact = torch.nn.functional.linear(x.double(), layers[0].dequantize().double(), layers[0].bias.double())
    share_launch(layers, backend)
    assert layers[0](x.half()).dtype == torch.float16
    assert off(layers[0](x.double()), exact) <= 1e-12
    y = layers[0](x.requires_grad_())
    assert off(y.detach().clone().mul_(2), 2 * exact) <= TOLERANCE[torch.float32]
    y.mul_(2)
    with pytest.raises(RuntimeError, match="uses packed kernels and cannot load weights; call keep_dense"):
        layers[0].load_state_dict(stored)
    layers[0].keep_dense(False)
    layers[0].load_state_dict(stored)


@pytest.mark.parametrize("grid", ["float16", "int8"])
def test_layers_without_shifts_multiply_and_are_stored_as_they_were(backend, device, grid):
    layers = [layer_of(rows, 300, 128, device, grid=grid, symmetric=True) for rows in (16, 8)]
    stored = [{name: tensor.clone() for name, tensor in layer.stored().items()} for layer in layers]
    x = torch.randn(3, 300, device=device)
    exact = [x.double() @ layer.matrix().dequantize(128, torch.float64).T for layer in layers]
    share_launch(layers, backend)
    for layer, before, y in zip(layers, stored, exact, strict=True):
        assert off(layer(x), y) <= TOLERANCE[torch.float32]
        after = layer.stored()
        assert {name.partition("_")[0] for name in before} == {"trits", "scale", "permutation"} | (
            {"row"} if grid == "int8" else set()
        )
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_attention_to_something_else_has_no_common_launch(backend, device):
    class Crossed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (layer_of(rows, 300, 128, device) for rows in (16, 8, 8))

        def forward(self, hidden_states, key_value_states=None):
            given = hidden_states if key_value_states is None else key_value_states
            return self.q_proj(hidden_states), self.k_proj(given), self.v_proj(given)

    model = Crossed()
    x, other = torch.randn(2, 3, 300, device=device)
    expected = model(x, other)
    use_kernels(model, backend=backend)
    assert len({layer.packed for layer in model.children()}) == 3
    torch.testing.assert_close(model(x, other), expected, rtol=1e-4, atol=1e-4)


def test_layers_that_are_given_the_same_input_share_a_launch(backend, device, monkeypatch):
    layers = [layer_of(rows, 300, 128, device, bias=True) for rows in (16, 8, 24)]
    x, other = torch.randn(2, 2, 5, 300, device=device)
    expected = [(layer(x), layer(other)) for layer in layers]
    share_launch(layers, backend)
    launches = []
    monkeypatch.setattr(
        "harness.ternary.kernels.shared.ternary_linear",
        lambda *given: launches.append(1) or ternary_linear(*given),
    )
    for order in ((0, 1, 2), (2, 0, 1)):
        launches.clear()
        for i in order:
            torch.testing.assert_close(layers[i](x), expected[i][0], rtol=1e-4, atol=1e-4)
        assert len(launches) == 1
    # Another tensor, the same layer again, equal numbers elsewhere: computed anew, and never a stale result.
    launches.clear()
    for i, given, which in ((0, x, 0), (1, other, 1), (2, x, 0), (2, x, 0), (0, x.clone(), 0), (1, x, 0)):
        torch.testing.assert_close(layers[i](given), expected[i][which], rtol=1e-4, atol=1e-4)
    assert len(launches) == 6
    for i in (0, 2):
        layers[i](x)
    assert layers[0].packed._pending is None  # nothing is kept longer than it is needed


def test_an_input_that_was_changed_in_place_is_another(backend, device):
    layers = [layer_of(rows, 300, 128, device) for rows in (16, 8)]
    x = torch.randn(3, 300, device=device)
    expected = torch.nn.functional.linear(x + 1, layers[1].dequantize())
    share_launch(layers, backend)
    layers[0](x)
    torch.testing.assert_close(layers[1](x.add_(1)), expected, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():  # which counts no changes
        x = torch.randn(3, 300, device=device)
        assert torch.equal(layers[0](x), layers[0](x))


@pytest.mark.parametrize("shape", [(0, 300), (2, 0, 300), (300,)], ids=str)
def test_shapes_of_activations_are_kept(backend, device, shape):
    layers = [layer_of(rows, 300, 128, device) for rows in (16, 8)]
    x = torch.randn(shape, device=device)
    expected = [layer(x) for layer in layers]
    share_launch(layers, backend)
    for layer, y in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)


def test_a_copy_can_be_made_between_the_layers(backend, device):
    layers = torch.nn.ModuleList(layer_of(rows, 300, 128, device) for rows in (16, 8))
    share_launch(list(layers), backend)
    x = 2 * torch.randn(3, 300, device=device, requires_grad=True)
    y = layers[0](x)
    copied = copy.deepcopy(layers)
    assert copied[0].packed is copied[1].packed
    assert copied[0].packed._pending is None
    assert torch.equal(copied[0](x), y)


@pytest.mark.parametrize("block_size", [64, 128, 512])
@pytest.mark.parametrize("grid", ["float16", "int8"])
def test_kernels_change_nothing_that_is_saved(backend, device, grid, block_size):
    layers = [layer_of(rows, 700, block_size, device, grid=grid) for rows in (16, 40)]
    layer = layers[1]
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(3, 700, device=device)
    share_launch(layers, backend)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    layer.to(torch.bfloat16)
    assert torch.equal(layer(x), y)
    after = layer.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    layer.keep_dense(True)
    assert layer.packed is None
    assert layer.state_dict().keys() == before.keys()
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dense", [True, False])
def test_other_tensors_can_be_loaded(device, dense):
    layer, other = (layer_of(rows, 300, 128, device) for rows in (24, 24))
    other.scale.mul_(2)
    layer.keep_dense(dense)
    layer.load_state_dict(other.state_dict())
    x = torch.randn(3, 300, device=device)
    torch.testing.assert_close(layer(x), other(x))


def test_blocks_that_no_fast_kernel_takes_are_dequantized(backend, device):
    layer = layer_of(33, 70, 50, device)
    x = torch.randn(2, 70, device=device)
    expected = torch.nn.functional.linear(x, layer.dequantize())
    share_launch([layer], backend)
    assert layer.packed is None
    assert torch.equal(layer(x), expected)


def test_kernels_leave_one_copy_of_the_weights(backend, device):
    layer = layer_of(64, 1024, 128, device)
    share_launch([layer], backend)
    size = sum(tensor.numel() * tensor.element_size() for tensor in layer.buffers())
    assert size == 64 * 1024 / 4 + 64 * 8 * 4 + 1024 * 2
