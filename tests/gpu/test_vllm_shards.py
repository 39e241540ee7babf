"""Shards of vLLM's ranks, laid out by the backend: the products of all ranks are those of the whole."""

import pytest
import torch
from torch import nn

from harness.ternary.kernels.launches import use_kernels
from harness.vllm.shards import product
from reference.layout import LEAST_BLOCK
from tests.harness.vllm.matrices import KINDS, Stored, load, shards_of, small_integers


def multiply(layers, x, backend, device):
    layers = nn.ModuleList(layers).to(device)
    use_kernels(layers, [[str(number) for number in range(len(layers))]], backend)
    assert all(layer.packed is layers[0].packed is not None for layer in layers)
    return product(layers, x.to(device)).cpu()


@pytest.mark.parametrize(("grid", "permuted"), KINDS)
def test_two_ranks_of_a_row_parallel_layer(backend, device, grid, permuted):
    matrix, x = Stored("o_proj", 9, 576, 128, grid, permuted), small_integers(2, 576)
    found = torch.zeros(2, 9)
    for inputs in (range(288), range(288, 576)):
        shards, parameters = shards_of([matrix], [9], 2, inputs)
        load(shards, parameters, matrix, None, slice(None), slice(None))
        layers = shards.layers(parameters, torch.float32, LEAST_BLOCK)
        found += multiply(layers, x[:, inputs], backend, device)
    assert torch.equal(found, x @ matrix.weights.T)


@pytest.mark.parametrize(("grid", "permuted"), KINDS)
def test_three_merged_matrices_are_one_launch(backend, device, grid, permuted):
    matrices = [Stored(name, 8, 100, 64, grid, permuted) for name in ("q", "ke", "val")]
    x = small_integers(2, 3, 100)
    shards, parameters = shards_of(matrices, [4, 4, 4], 2)
    for index, (shard, matrix) in enumerate(zip("qkv", matrices, strict=True)):
        load(shards, parameters, matrix, shard, slice(4 * index, 4 * index + 4), slice(4, 8))
    layers = shards.layers(parameters, torch.float32, LEAST_BLOCK)
    expected = x @ torch.cat([matrix.weights[4:] for matrix in matrices]).T
    assert torch.equal(multiply(layers, x, backend, device), expected)
