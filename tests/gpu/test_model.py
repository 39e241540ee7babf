"""Whole models that multiply by packed trits: what they compute, and what is saved of them."""

import copy

import pytest
import torch

import harness
from harness.backends import load_backend
from harness.compute import compute_for
from harness.ternary.kernels.launches import use_kernels
from harness.ternary.linear import TernaryLinear
from harness.ternary.reading import tensors_of
from tests.harness.export import checkpoints

PROMPT = torch.tensor([[5, 9, 200, 17, 33, 64], [11, 7, 250, 3, 90, 41]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model") / "checkpoint", checkpoints.config_of("tied"))


@pytest.fixture(scope="module")
def model(folder):
    """One that a device runs by kernels as it is loaded, and the host where it is told to."""
    backend = load_backend("gpu")
    loaded = harness.load(folder, compute_for(backend).device, dense=False)
    if not backend.on_device:
        use_kernels(loaded, backend=backend)
    return loaded


def test_logits_are_those_of_dense_weights(model, folder):
    expected = harness.load(folder)(PROMPT).logits
    for logits in (
        model(PROMPT.to(model.device)).logits,
        copy.deepcopy(model)(PROMPT.to(model.device)).logits,
    ):
        torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-4)
    assert all(layer.packed._pending is None for layer in ternary(model))


def test_projections_of_one_input_share_a_launch(model):
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        assert attention.q_proj.packed is attention.k_proj.packed is attention.v_proj.packed
        assert mlp.gate_proj.packed is mlp.up_proj.packed
    assert len({layer.packed for layer in ternary(model)}) == 4 * len(model.model.layers)


def test_what_is_saved_is_what_was_stored(model, folder, tmp_path):
    model.save_pretrained(tmp_path / "again")
    stored, saved = (dict(tensors_of(where)) for where in (folder, tmp_path / "again"))
    assert stored.keys() == saved.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor, saved[name]), name


def test_text_is_that_of_dense_weights(model, folder):
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = harness.load(folder).generate(PROMPT, **options)
    for cache in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(PROMPT.to(model.device), **cache, **options).cpu(), expected)


def ternary(model):
    return [module for module in model.modules() if isinstance(module, TernaryLinear)]
