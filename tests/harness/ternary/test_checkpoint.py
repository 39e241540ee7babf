"""The checkpoint: what is written is read back bit for bit, and damage is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import harness
from harness.backends import load_backend
from harness.errors import UserError
from harness.models.folder import INDEX, SINGLE
from harness.ternary.format import packed_bytes, packed_tensors, permutation_dtype
from harness.ternary.linear import TernaryLinear
from harness.ternary.reading import verify
from reference.types import TernaryMatrix

REFERENCE = load_backend("reference")
Q_PROJ = "model.layers.1.self_attn.q_proj"


def test_bytes_on_disk_are_what_the_format_says(quantized: Path) -> None:
    """Decoded here by hand from the raw tensors: place values, blocks, permutation."""
    tensors = all_tensors(quantized)
    trits, scale = tensors[f"{Q_PROJ}.trits"], tensors[f"{Q_PROJ}.scale"].float()
    shift, permutation = tensors[f"{Q_PROJ}.shift"].float(), tensors[f"{Q_PROJ}.permutation"]
    assert trits.shape == (128, 26)
    assert scale.shape == (128, 2)
    assert permutation.dtype == torch.uint8
    weight = harness.load(quantized).get_submodule(Q_PROJ).weight
    for i in (0, 17, 127):
        for j in range(128):
            digit = int(trits[i, j // 5]) // 3 ** (j % 5) % 3
            value = scale[i, j // 64] * (digit - 1) + shift[i, j // 64]
            assert weight[i, int(permutation[j])] == value.bfloat16()


def test_a_loaded_model_is_ready_to_use(quantized: Path) -> None:
    model = harness.load(str(quantized))
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert isinstance(model.model.layers[0].mlp.up_proj, TernaryLinear)


def test_the_size_on_disk_is_the_size_announced(quantized: Path) -> None:
    tensors = all_tensors(quantized)
    for name in (Q_PROJ, "model.layers.0.mlp.down_proj"):
        stored = [t for key, t in tensors.items() if key.startswith(f"{name}.")]
        n, m = (128, 128) if name == Q_PROJ else (128, 176)
        assert sum(t.numel() * t.element_size() for t in stored) == packed_bytes(n, m, 64, "float16", True)


@pytest.mark.parametrize(
    ("columns", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65537, "uint32")]
)
def test_permutations_take_the_smallest_type(columns: int, dtype: str) -> None:
    assert permutation_dtype(columns) == np.dtype(dtype)


def test_an_identity_permutation_is_left_out() -> None:
    matrix = TernaryMatrix(
        np.zeros((2, 4), np.int8), np.ones((2, 1), np.float16), np.ones((2, 1), np.float16), np.arange(4), 4
    )
    assert set(packed_tensors("a", matrix, REFERENCE)) == {
        "a.trits",
        "a.scale",
        "a.shift",
    }


@pytest.mark.parametrize(
    ("grid", "block_size", "bits"), [("float16", 128, 1.725), ("float16", 256, 1.6625), ("int8", 64, 1.727)]
)
def test_a_matrix_without_shifts_takes_fewer_bits(grid: str, block_size: int, bits: float) -> None:
    rows, columns = 1024, 5120
    size = packed_bytes(rows, columns, block_size, grid, permuted=False, symmetric=True)
    assert 8 * size / (rows * columns) == pytest.approx(bits, abs=3e-3)


def edit_config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def edit_tensor(
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor | None],
    unlist: bool = False,
    beside: dict[str, torch.Tensor] | None = None,
) -> Callable[[Path], None]:
    """Change a tensor, or take it away (from the index too, if `unlist`), or put others beside it."""

    def damage(folder: Path) -> None:
        file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
        tensors = load_file(file)
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed
        save_file({**tensors, **(beside or {})}, file)
        if unlist:
            edit_index(lambda m: m.pop(name))(folder)
        edit_index(lambda m: m.update(dict.fromkeys(beside or {}, file.name)))(folder)

    return damage


def put(place: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[place] = value
        return tensor

    return change


def edit_index(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def truncate(folder: Path) -> None:
    file = folder / "model-00002-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


DAMAGE = {
    "version": (
        edit_config(lambda c: c["quantization_config"].update(format_version=99)),
        "has format version 99; this program reads versions 1 and 2",
    ),
    "method": (
        edit_config(lambda c: c["quantization_config"].update(quant_method="awq")),
        "not a ternary checkpoint",
    ),
    "modules": (
        edit_config(lambda c: c["quantization_config"].pop("modules")),
        "modules of quantization_config must be a list of names",
    ),
    "unknown module": (
        edit_config(lambda c: c["quantization_config"]["modules"].append("model.norm")),
        r"model\.norm is not a linear layer",
    ),
    "architecture": (edit_config(lambda c: c.update(model_type="no-such")), "does not describe a model"),
    "illegal byte": (
        edit_tensor(f"{Q_PROJ}.trits", put((3, 4), 243)),
        rf"{Q_PROJ}\.trits is damaged: byte 243",
    ),
    "illegal filling": (
        edit_tensor(f"{Q_PROJ}.trits", put((3, 25), 0)),
        rf"{Q_PROJ}\.trits is damaged.*filled",
    ),
    "trits shape": (
        edit_tensor(f"{Q_PROJ}.trits", lambda t: t[:, 1:].contiguous()),
        rf"{Q_PROJ}\.trits is uint8 \(128, 25\), expected uint8 \(128, 26\)",
    ),
    "scale type": (
        edit_tensor(f"{Q_PROJ}.scale", lambda t: t.float()),
        rf"{Q_PROJ}\.scale is float32 .*expected float16",
    ),
    "scale value": (edit_tensor(f"{Q_PROJ}.scale", put((0, 0), torch.inf)), rf"{Q_PROJ}\.scale.*not finite"),
    "shift missing": (
        edit_tensor(f"{Q_PROJ}.shift", lambda t: None, unlist=True),
        rf"the tensor {Q_PROJ}\.shift is missing",
    ),
    "tensor gone": (edit_tensor(f"{Q_PROJ}.shift", lambda t: None), rf"lacks the tensor {Q_PROJ}\.shift"),
    "permutation": (
        edit_tensor(f"{Q_PROJ}.permutation", put((0,), 200)),
        rf"{Q_PROJ}\.permutation is damaged: it does not hold every column exactly once",
    ),
    "permutation gone": (
        edit_tensor(f"{Q_PROJ}.permutation", lambda t: None, unlist=True),
        rf"the tensor {Q_PROJ}\.permutation is missing",
    ),
    "grid": (
        edit_config(lambda c: c["quantization_config"].update(grid="int4")),
        "grid of quantization_config is 'int4', not one of float16, int8",
    ),
    "symmetric of another kind": (
        edit_config(lambda c: c["quantization_config"].update(symmetric="none")),
        "symmetric of quantization_config must be true or false",
    ),
    "shifts of a symmetric model": (
        edit_config(lambda c: c["quantization_config"].update(symmetric=True)),
        r"has a tensor that the model does not have: model\.layers\.0\..*\.shift",
    ),
    "modules of another kind": (
        edit_config(lambda c: c["quantization_config"].update(modules=[["a"]])),
        "modules of quantization_config must be a list of names",
    ),
    "inputs shared by a layer that is not packed": (
        edit_config(lambda c: c["quantization_config"].update(shared_inputs=[["model.norm"]])),
        "shared_inputs of quantization_config must be groups of modules",
    ),
    "inputs shared by a layer in two groups": (
        edit_config(lambda c: c["quantization_config"]["shared_inputs"].append([Q_PROJ])),
        "shared_inputs of quantization_config must be groups of modules",
    ),
    "shared inputs that are no names": (
        edit_config(lambda c: c["quantization_config"].update(shared_inputs=[[{}]])),
        "shared_inputs of quantization_config must be groups of modules",
    ),
    "shared inputs of another kind": (
        edit_config(lambda c: c["quantization_config"].update(shared_inputs={"a": 1})),
        "shared_inputs of quantization_config must be groups of modules",
    ),
    "coded of another kind": (
        edit_config(lambda c: c["quantization_config"].update(coded="model.embed_tokens")),
        "coded of quantization_config must be a list of names",
    ),
    "coded module": (
        edit_config(lambda c: c["quantization_config"].update(coded=["model.norm"])),
        r"config\.json: `coded` lists a LlamaRMSNorm, which has no weight matrix",
    ),
    "block size that is no number": (
        edit_config(lambda c: c["quantization_config"].update(block_size=True)),
        "block_size of quantization_config must be a positive integer",
    ),
    "block size": (
        edit_config(lambda c: c["quantization_config"].update(block_size="64")),
        "block_size of quantization_config must be a positive integer",
    ),
    "heads": (edit_config(lambda c: c.update(num_attention_heads=0)), "does not describe a model"),
    "activation": (edit_config(lambda c: c.update(hidden_act="no-such")), "does not describe a model"),
    "width": (edit_config(lambda c: c.update(hidden_size="abc")), "does not describe a model"),
    "index of lists": (edit_index(lambda m: m.update({"model.norm.weight": [1]})), "no weight_map"),
    "generation": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        r"generation_config\.json is damaged: not valid JSON",
    ),
    "weight beside": (
        edit_tensor("model.norm.weight", lambda t: t, beside={f"{Q_PROJ}.weight": torch.zeros(128, 128)}),
        rf"holds {Q_PROJ}\.weight both dense and packed",
    ),
    "norm value": (
        edit_tensor("model.norm.weight", put((4,), torch.nan)),
        r"model\.norm\.weight is damaged: it has a value that is not finite",
    ),
    "norm type": (
        edit_tensor("model.norm.weight", lambda t: t.int()),
        r"model\.norm\.weight is int32, expected bfloat16",
    ),
    "unlisted": (
        edit_index(lambda m: m.pop("model.norm.weight")),
        r"the index does not list: model\.norm\.weight",
    ),
    "norm missing": (
        edit_tensor("model.norm.weight", lambda t: None, unlist=True),
        r"lacks model\.norm\.weight",
    ),
    "norm shape": (
        edit_tensor("model.norm.weight", lambda t: t[1:].contiguous()),
        r"model\.norm\.weight has shape \(127,\), expected \(128,\)",
    ),
    "left over": (
        edit_tensor("model.norm.weight", lambda t: t),
        None,
    ),
    "truncated": (truncate, "model-00002-of-00004.safetensors is missing or damaged"),
    "shard gone": (
        lambda folder: (folder / "model-00001-of-00004.safetensors").unlink(),
        "model-00001-of-00004.safetensors is missing or damaged",
    ),
    "index gone": (lambda folder: (folder / INDEX).unlink(), "index.json is missing or damaged"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
}


@pytest.mark.parametrize("kind", [k for k, (_, message) in DAMAGE.items() if message])
def test_damage_is_refused_by_name(damaged: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(damaged)
    with pytest.raises(UserError, match=message):
        harness.load(damaged)


@pytest.mark.parametrize("entry", ["grid", "symmetric"])
def test_without_a_kind_of_grid_it_is_float16_with_shifts(damaged: Path, entry: str) -> None:
    edit_config(lambda c: c["quantization_config"].pop(entry))(damaged)
    harness.load(damaged)


def test_a_rewritten_shard_without_damage_loads(damaged: Path) -> None:
    """Guards the test above: rewriting a shard is not what is refused."""
    DAMAGE["left over"][0](damaged)
    harness.load(damaged)


def test_a_tensor_left_over_is_refused(damaged: Path) -> None:
    file = damaged / "model-00004-of-00004.safetensors"
    save_file({**load_file(file), "model.extra": torch.zeros(1)}, file)
    edit_index(lambda m: m.update({"model.extra": file.name}))(damaged)
    with pytest.raises(UserError, match=r"does not have: model\.extra"):
        harness.load(damaged)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        harness.load(tmp_path / "nothing")


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            tensors.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    return tensors


@pytest.mark.parametrize(
    ("limit", "weight", "culprit"), [(torch.inf, 1, None), (torch.nan, 1, "limit"), (1, torch.inf, "weight")]
)
def test_only_buffers_may_be_infinite(
    limit: float, weight: float, culprit: str | None, tmp_path: Path
) -> None:
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("limit", torch.zeros(1))
    tensors = {"weight": torch.full((1, 1), float(weight)), "limit": torch.full((1,), float(limit))}
    save_file(tensors, tmp_path / SINGLE)
    if culprit is None:
        verify([tmp_path / SINGLE], model)
    else:
        with pytest.raises(UserError, match=f"{culprit} is damaged: it has a value that is not finite"):
            verify([tmp_path / SINGLE], model)
