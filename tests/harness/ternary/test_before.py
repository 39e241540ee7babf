"""Checkpoints written by format version 1 as it was first published load, and are saved again, byte for byte.

`before/` holds two of a small random LLaMA: SSR with float16 grids; and the original column order with alpha,
mu, embedding and head in 8 bits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import harness
from reference.packing import unpack_base3

BEFORE = sorted((Path(__file__).parent / "before").iterdir())


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def dense(tensors: dict[str, torch.Tensor], name: str, block_size: int) -> np.ndarray:
    """The weights of a linear layer in float32, from the description in `reference.packing` alone."""
    parts = {
        key.removeprefix(f"{name}."): t.numpy() for key, t in tensors.items() if key.startswith(f"{name}.")
    }
    width = 176 if name.endswith("down_proj") else 128
    scale, shift = (parts[part].astype(np.float32) for part in ("scale", "shift"))
    if "row_factor" in parts:
        row = parts["row_factor"].astype(np.float32)[:, None]
        scale = row * parts["scale_factor"].astype(np.float32) * scale
        shift = row * parts["shift_factor"].astype(np.float32) * shift
    trits = unpack_base3(parts["trits"], width)
    block = np.arange(width) // block_size
    ordered = scale[:, block] * trits + shift[:, block]
    weights = np.empty_like(ordered)
    weights[:, parts.get("permutation", np.arange(width))] = ordered
    return weights


@pytest.mark.parametrize("folder", BEFORE, ids=lambda folder: folder.name)
def test_weights_are_what_the_format_describes(folder: Path) -> None:
    model = harness.load(folder)
    quantization = model.config.quantization_config
    tensors = stored(folder)
    assert len(quantization.modules) == 7
    for name in quantization.modules:
        expected = torch.from_numpy(dense(tensors, name, quantization.block_size)).bfloat16()
        assert torch.equal(model.get_submodule(name).dequantize(), expected)
    embedding = tensors["model.embed_tokens.weight"]
    if quantization.coded:
        embedding = (tensors["model.embed_tokens.row_factor"][:, None] * embedding).bfloat16()
    assert torch.equal(model.get_input_embeddings().weight, embedding)


@pytest.mark.parametrize("folder", BEFORE, ids=lambda folder: folder.name)
def test_saved_again_every_tensor_has_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    harness.load(folder).save_pretrained(tmp_path)
    before, after = stored(folder), stored(tmp_path)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
