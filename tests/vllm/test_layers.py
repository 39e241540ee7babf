"""vLLM's own layers and loaders, two ranks in one process, against products of the whole matrices."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.errors import UserError
from harness.ternary.embedding import encode
from harness.ternary.format import StoredLayers
from tests.harness.export import checkpoints
from tests.harness.vllm.matrices import KINDS, Stored, small_integers

pytest.importorskip("vllm")

from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from harness.vllm.quantization import TernaryQuantization

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def quantization(matrices: list[Stored], merged: dict[str, list[str]] | None = None) -> TernaryQuantization:
    unpermuted = [matrix.name for matrix in matrices if not matrix.permuted]
    names = [matrix.name for matrix in matrices]
    stored = StoredLayers(matrices[0].block_size, matrices[0].grid, names, unpermuted, None, [])
    config = TernaryQuantization(stored, torch.float32)
    config.packed_modules_mapping = MERGED if merged is None else merged
    return config


def load(layer: Any, matrices: dict[Any, Stored]) -> Any:
    """Load matrices by their shard ids, as models do."""
    for shard, matrix in matrices.items():
        for part, tensor in matrix.tensors.items():
            parameter = getattr(layer, part)
            parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize(("grid", "permuted"), KINDS)
def test_projections_of_attention_of_which_ranks_share_a_head(as_rank, grid, permuted):
    q, k, v = (
        Stored(f"{name}_proj", rows, 100, 64, grid, permuted)
        for name, rows in (("q", 64), ("k", 8), ("v", 8))
    )
    config, x = quantization([q, k, v]), small_integers(2, 3, 100)
    for rank in range(2):
        as_rank(rank, 2)
        layer = QKVParallelLinear(100, 8, 8, 1, False, quant_config=config, prefix="qkv_proj")
        y, _ = load(layer, {"v": v, "q": q, "k": k})(x)
        rows = torch.cat([q.weights[32 * rank : 32 * rank + 32], k.weights, v.weights])
        assert torch.equal(y, x @ rows.T)


@pytest.mark.parametrize(("grid", "permuted"), KINDS)
def test_two_merged_matrices(as_rank, grid, permuted):
    gate, up = (Stored(name, 48, 100, 64, grid, permuted) for name in ("gate_proj", "up_proj"))
    config, x = quantization([gate, up]), small_integers(3, 100)
    for rank in range(2):
        as_rank(rank, 2)
        layer = MergedColumnParallelLinear(100, [48, 48], False, quant_config=config, prefix="gate_up_proj")
        y, _ = load(layer, {1: up, 0: gate})(x)
        held = slice(24 * rank, 24 * rank + 24)
        assert torch.equal(y, x @ torch.cat([gate.weights[held], up.weights[held]]).T)


def test_matrices_that_are_merged_on_disk(as_rank):
    matrix, x = Stored("gate_up_proj", 96, 100, permuted=True), small_integers(3, 100)
    config = quantization([matrix], {"gate_up_proj": ["gate_up_proj"]})
    for rank in range(2):
        as_rank(rank, 2)
        layer = MergedColumnParallelLinear(100, [48, 48], False, quant_config=config, prefix="gate_up_proj")
        y, _ = load(layer, {None: matrix})(x)
        first = 24 * rank
        rows = torch.cat([matrix.weights[first : first + 24], matrix.weights[first + 48 : first + 72]])
        assert torch.equal(y, x @ rows.T)


@pytest.mark.parametrize(("grid", "permuted"), KINDS)
def test_two_ranks_of_a_row_parallel_layer_sum_to_the_whole_product(as_rank, grid, permuted):
    matrix, x = Stored("o_proj", 40, 576, 64, grid, permuted), small_integers(3, 576)
    config, found = quantization([matrix]), torch.zeros(3, 40)
    for rank in range(2):
        as_rank(rank, 2)
        layer = RowParallelLinear(576, 40, False, quant_config=config, reduce_results=False, prefix="o_proj")
        y, _ = load(layer, {None: matrix})(x[:, 288 * rank : 288 * rank + 288])
        found += y
    assert torch.equal(found, x @ matrix.weights.T)


@pytest.mark.parametrize("kind", [ColumnParallelLinear, ReplicatedLinear])
def test_a_layer_of_its_own_with_a_bias(as_rank, kind):
    matrix, x, bias = Stored("fc1", 48, 100), small_integers(3, 100), small_integers(48)
    for rank in range(2):
        as_rank(rank, 2)
        layer = kind(100, 48, True, quant_config=quantization([matrix]), prefix="fc1")
        layer.bias.weight_loader(layer.bias, bias)
        y, _ = load(layer, {None: matrix})(x)
        held = slice(24 * rank, 24 * rank + 24) if kind is ColumnParallelLinear else slice(None)
        assert torch.equal(y, (x @ matrix.weights.T + bias)[:, held])


def test_a_layer_that_is_not_packed_is_loaded_by_vllm(as_rank):
    layer = ReplicatedLinear(
        100, 8, False, quant_config=quantization([Stored("fc1", 48, 100)]), prefix="gate"
    )
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)


def test_a_merged_layer_that_is_packed_in_part_is_refused(as_rank):
    config = quantization([Stored("gate_proj", 48, 100)])
    with pytest.raises(
        UserError, match="vLLM merges gate_proj with up_proj, which the checkpoint does not pack"
    ):
        MergedColumnParallelLinear(100, [48, 48], False, quant_config=config, prefix="gate_up_proj")


def test_a_folder_that_lacks_a_file_is_refused(as_rank, tmp_path):
    """vLLM would leave the norms in that file as they are made."""
    folder = checkpoints.write(tmp_path / "checkpoint", checkpoints.config_of("tied"))
    (folder / "model-00001-of-00001.safetensors").unlink()
    config = quantization([Stored("fc1", 48, 100)])
    config.maybe_update_config(str(folder))
    with pytest.raises(UserError, match=r"model-00001-of-00001\.safetensors is missing or damaged"):
        ReplicatedLinear(100, 48, False, quant_config=config, prefix="fc1")


def test_a_first_checkpoint_has_weights_of_the_dtype_of_the_model(as_rank):
    entry = {
        "quant_method": "pt2_llm",
        "format_version": 1,
        "block_size": 64,
        "modules": [],
        "unpermuted": [],
    }
    config = TernaryQuantization.from_config(entry)
    config.maybe_update_config("name", SimpleNamespace(dtype=torch.bfloat16))
    assert config.weight_dtype == torch.bfloat16


def test_layers_are_renamed_as_vllm_renames_them(as_rank):
    config = quantization([Stored("language_model.model.layers.0.o_proj", 48, 100)])
    mapper = WeightsMapper(orig_to_new_prefix={"language_model.model.": "model."})
    config.apply_vllm_mapper(mapper)
    layer = ReplicatedLinear(100, 48, False, quant_config=config, prefix="model.layers.0.o_proj")
    assert layer.quant_method.names == ["model.layers.0.o_proj"]


@pytest.mark.parametrize("order", [("weight", "row_factor"), ("row_factor", "weight")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_and_a_head_in_8_bits(as_rank, order, dtype):
    weight = torch.randn(200, 32)
    parts = encode(weight)
    stored = StoredLayers(64, "float16", [], [], None, ["model.embed_tokens", "lm_head"])
    config = TernaryQuantization(stored, dtype)
    expected = (parts["row_factor"][:, None] * parts["weight"]).to(dtype).float()
    found = []
    for rank in range(2):
        as_rank(rank, 2)
        for layer in (
            VocabParallelEmbedding(200, 32, quant_config=config),  # some models give it no name
            ParallelLMHead(200, 32, quant_config=config, prefix="lm_head"),
        ):
            for part in order:
                parameter = getattr(layer, part)
                parameter.weight_loader(parameter, parts[part])
            layer.quant_method.process_weights_after_loading(layer)
            found.append(layer.weight.float())
    assert torch.equal(torch.cat(found[::2])[:200], expected)
    assert torch.equal(torch.cat(found[1::2])[:200], expected)


@pytest.mark.parametrize("part", ["weight", "row_factor"])
def test_codes_that_are_missing_are_named(as_rank, part):
    parts = encode(torch.randn(200, 32))
    del parts[part]
    config = TernaryQuantization(StoredLayers(64, "float16", [], [], None, ["embed"]), torch.float32)
    layer = VocabParallelEmbedding(200, 32, quant_config=config, prefix="embed")
    for name, tensor in parts.items():
        getattr(layer, name).weight_loader(getattr(layer, name), tensor)
    with pytest.raises(UserError, match=rf"the tensor embed\.{part} is missing"):
        layer.quant_method.process_weights_after_loading(layer)


def test_the_plugin_is_registered_without_numba():
    """With which vLLM 0.32 does not start on a CPU."""
    script = """
import sys
from vllm.plugins import load_general_plugins
from vllm.model_executor.layers.quantization import get_quantization_config
load_general_plugins()
assert get_quantization_config("pt2_llm").__module__ == "harness.vllm.quantization"
assert "llvmlite" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
