"""Shards of packed matrices: every weight is exactly that of the whole, on whatever rank it lies."""

from __future__ import annotations

import importlib
import tomllib
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harness.errors import UserError
from harness.ternary.kernels.launches import use_kernels
from harness.ternary.linear import TernaryLinear
from harness.vllm.shards import BY_ROWS, columns_of, product, ternary_layer
from tests.harness.vllm.matrices import KINDS, Stored, load, shards_of, small_integers

ROOT = Path(__file__).parents[3]


def multiply(layers: list[TernaryLinear], x: torch.Tensor) -> torch.Tensor:
    use_kernels(nn.ModuleList(layers), [[str(number) for number in range(len(layers))]])
    return product(layers, x)


@settings(max_examples=60, deadline=None)
@given(
    columns=st.integers(1, 40).map(lambda count: 12 * count),
    ranks=st.sampled_from([1, 2, 3, 4, 6]),
    block_size=st.sampled_from([5, 32, 64, 100, 128]),
    kind=st.sampled_from(KINDS),
    least=st.sampled_from([1, 8, 64]),
)
def test_every_column_keeps_its_weights_on_its_rank(columns, ranks, block_size, kind, least):
    matrix = Stored("o_proj", 3, columns, block_size, *kind)
    shards, parameters = shards_of([matrix], [3], ranks)
    load(shards, parameters, matrix, None, slice(None), slice(None))
    whole = shards.layers(parameters, torch.float32)[0].matrix()
    share = columns // ranks
    for rank in range(ranks):
        inputs = range(rank * share, (rank + 1) * share)
        part, width = columns_of(whole, block_size, inputs, least)
        layer = ternary_layer(part, width, torch.float32)
        assert torch.equal(layer.dequantize()[:, :share], matrix.weights[:, inputs])
        # As the checkpoint would store such a matrix.
        again = TernaryLinear(layer.in_features, 3, width, matrix.grid, layer.permuted, False, torch.float32)
        again.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("inputs", [range(128), range(128, 256), range(192, 300)], ids=str)
def test_whole_blocks_of_neighbouring_columns_stay_as_they_are(inputs):
    matrix = Stored("o_proj", 3, 300)
    shards, parameters = shards_of([matrix], [3], 1, inputs)
    load(shards, parameters, matrix, None, slice(None), slice(None))
    (layer,) = shards.layers(parameters, torch.float32)
    assert (layer.in_features, layer.block_size, layer.permuted) == (len(inputs), 64, False)


@pytest.mark.parametrize("least", [8, 64])
def test_a_permutation_over_all_blocks_costs_less_than_twice_the_columns(least):
    matrix = Stored("o_proj", 3, 2048, 128, permuted=True)
    shards, parameters = shards_of([matrix], [3], 2, range(1024, 2048))
    load(shards, parameters, matrix, None, slice(None), slice(None))
    (layer,) = shards.layers(parameters, torch.float32, least)
    assert layer.in_features < 2 * 1024
    assert layer.block_size >= least


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("grid", "permuted"), KINDS)
def test_two_ranks_of_a_row_parallel_layer_sum_to_the_whole_product(grid, permuted, symmetric):
    """576 columns in blocks of 64, of which the ranks share one; 288 is no multiple of 5 either."""
    matrix, x = Stored("down_proj", 40, 576, 64, grid, permuted, symmetric), small_integers(3, 576)
    found = torch.zeros(3, 40)
    for inputs in (range(288), range(288, 576)):
        shards, parameters = shards_of([matrix], [40], 2, inputs)
        load(shards, parameters, matrix, None, slice(None), slice(None))
        found += multiply(shards.layers(parameters, torch.float32), x[:, inputs])
    assert torch.equal(found, x @ matrix.weights.T)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("grid", "permuted"), KINDS)
def test_two_ranks_of_merged_projections_give_the_rows_of_the_whole_product(grid, permuted, symmetric):
    """Four heads of queries to a rank; the one head of keys and of values is on both."""
    q, k, v = (
        Stored(name, rows, 100, 64, grid, permuted, symmetric)
        for name, rows in (("q", 64), ("ke", 8), ("val", 8))
    )
    x = small_integers(2, 3, 100)
    for rank in range(2):
        shards, parameters = shards_of([q, k, v], [32, 8, 8], 2)
        of_rank = slice(32 * rank, 32 * rank + 32)
        load(shards, parameters, v, "v", slice(40, 48), slice(8))  # in any order
        load(shards, parameters, q, "q", slice(32), of_rank)
        load(shards, parameters, k, "k", slice(32, 40), slice(8))
        rows = torch.cat([q.weights[of_rank], k.weights, v.weights])
        assert torch.equal(multiply(shards.layers(parameters, torch.float32), x), x @ rows.T)


def test_a_matrix_that_vllm_splits_is_one_matrix_with_one_permutation():
    """Such as gate_up_proj of Phi-3, of which a rank holds half of the gates and half of the rest."""
    matrix, x = Stored("gate_up_proj", 32, 100, permuted=True), small_integers(3, 100)
    shards, parameters = shards_of([matrix], [8, 8], 2)
    held = torch.cat([torch.arange(8, 16), torch.arange(24, 32)])
    for part, tensor in matrix.tensors.items():
        shards.load(
            part, tensor, None, partial(parameters[part].copy_, tensor[held] if part in BY_ROWS else tensor)
        )
    assert torch.equal(multiply(shards.layers(parameters, torch.float32), x), x @ matrix.weights[held].T)


def test_weights_are_rounded_to_the_dtype_of_calibration():
    matrix = Stored("o_proj", 3, 100)
    matrix.tensors["scale"] += 2**-8
    shards, parameters = shards_of([matrix], [3], 1)
    load(shards, parameters, matrix, None, slice(None), slice(None))
    (layer,) = shards.layers(parameters, torch.bfloat16)
    assert layer.dequantize().dtype == torch.bfloat16


class TestRefusals:
    @pytest.mark.parametrize("part", Stored("o_proj", 3, 100, 64, "int8", True).tensors)
    def test_a_missing_tensor_is_named(self, part):
        matrix = Stored("o_proj", 3, 100, 64, "int8", True)
        del matrix.tensors[part]
        shards, parameters = shards_of([matrix], [3], 1)
        load(shards, parameters, matrix, None, slice(None), slice(None))
        with pytest.raises(UserError, match=f"the tensor o_proj.{part} is missing"):
            shards.layers(parameters, torch.float32)

    def test_a_missing_matrix_is_named(self):
        gate, up = Stored("gate_proj", 4, 100), Stored("up_proj", 4, 100)
        shards, parameters = shards_of([gate, up], [4, 4], 1)
        load(shards, parameters, gate, 0, slice(4), slice(None))
        with pytest.raises(UserError, match=r"the tensor up_proj\.trits is missing"):
            shards.layers(parameters, torch.float32)

    @pytest.mark.parametrize(
        ("part", "damaged", "message"),
        [
            ("trits", torch.full((3, 20), 243, dtype=torch.uint8), "o_proj.trits is damaged: byte 243"),
            ("scale", torch.full((3, 2), torch.nan).half(), "o_proj.scale is damaged: .* not finite"),
            ("scale", torch.ones(3, 2), r"o_proj.scale is float32 \(3, 2\), expected float16"),
            (
                "shift",
                torch.ones(3, 3).half(),
                r"o_proj.shift is float16 \(3, 3\), expected float16 \(3, 2\)",
            ),
            ("scale", torch.ones(6, 2).half(), "o_proj.scale has 6 rows, but vLLM's model has up to 3"),
            ("permutation", torch.zeros(100, dtype=torch.uint8), "o_proj.permutation is damaged"),
        ],
    )
    def test_a_damaged_tensor_is_named(self, part, damaged, message):
        shards, _ = shards_of([Stored("o_proj", 3, 100, permuted=True)], [3], 1)
        with pytest.raises(UserError, match=message):
            shards.load(part, damaged, None, lambda: pytest.fail("must not be loaded"))

    def test_a_permutation_that_the_config_denies(self):
        shards, _ = shards_of([Stored("o_proj", 3, 100)], [3], 1)
        with pytest.raises(UserError, match=r"config\.json says that o_proj is not reordered"):
            shards.load("permutation", torch.arange(100, dtype=torch.uint8), None, lambda: None)

    @pytest.mark.parametrize("shard", ["index_q", 2, (0, 1)])
    def test_a_part_that_the_plugin_does_not_know(self, shard):
        shards, _ = shards_of([Stored("gate", 4, 100), Stored("up", 4, 100)], [4, 4], 1)
        with pytest.raises(UserError, match=r"vLLM has a part .* for gate, up; this is not supported"):
            shards.load("scale", torch.ones(4, 2).half(), shard, lambda: None)

    def test_matrices_that_vllm_splits_and_merges(self):
        with pytest.raises(UserError, match="vLLM splits qkv, z into 4 parts"):
            shards_of([Stored("qkv", 4, 100), Stored("z", 4, 100)], [4, 4, 4, 4], 1)


def test_vllm_finds_the_plugin_by_an_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["pt2_llm"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
