"""Ternary layers inside transformers: loading, saving, moving, generating."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import harness
import harness.hf
from harness import perplexity
from harness.compute import Compute
from harness.errors import UserError
from harness.models.decoder import locate_layers
from harness.models.folder import INDEX
from harness.ternary.format import pack_base3, require_base3, unpack_base3
from harness.ternary.linear import TernaryLinear
from harness.ternary.reading import tensors_of, weight_map
from reference import packing
from reference.types import CodedGrid, TernaryConfig, TernaryMatrix
from tests.harness import tiny
from tests.harness.quantize.test_quantize import run_workflow

PROMPT = torch.tensor([[3, 7, 11, 5], [4, 4, 90, 8]])


OTHER_GRIDS = ("llama int8", "llama symmetric", "llama int8 symmetric")


@pytest.fixture(scope="module", params=[*sorted(tiny.CONFIGS), *OTHER_GRIDS])
def ternarized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of every architecture, of weights that are on no grid."""
    folder = tmp_path_factory.mktemp("hf")
    words = folder / "words.txt"
    words.write_text(tiny.words(400))
    kind, *grid = request.param.split()
    config = TernaryConfig(
        block_size=tiny.BLOCK,
        grid="int8" if "int8" in grid else "float16",
        shift="none" if "symmetric" in grid else "free",
    )
    run_workflow(tiny.make_model(kind, ternary=False), folder / "out", words, config)
    return folder / "out"


def with_plain_layers(folder: Path) -> torch.nn.Module:
    """The model with nn.Linear layers of the weights that the reference makes of the stored tensors."""
    model = harness.load(folder)
    tensors = dict(tensors_of(folder))
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, TernaryLinear):
            continue
        permutation = tensors.get(f"{name}.permutation", torch.arange(layer.in_features)).numpy()
        grids: dict[str, Any] = {"scale": None, "shift": None}
        for part in grids:
            if f"{name}.{part}" not in tensors:
                continue
            grids[part] = tensors[f"{name}.{part}"].numpy()
            if f"{name}.row_factor" in tensors:
                row = tensors[f"{name}.row_factor"].numpy()[:, None]
                grids[part] = CodedGrid(grids[part], row, tensors[f"{name}.{part}_factor"].numpy()[None])
        matrix = TernaryMatrix(
            packing.unpack_base3(tensors[f"{name}.trits"].numpy(), layer.in_features),
            grids["scale"],
            grids["shift"],
            permutation.astype(np.intp),
            tiny.BLOCK,
        )
        plain = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight.data = torch.from_numpy(matrix.dequantize()).to(model.dtype)
        if layer.bias is not None:
            plain.bias.data = layer.bias.data
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, plain)
    return model


def test_logits_are_those_of_the_dequantized_model(ternarized: Path) -> None:
    expected = with_plain_layers(ternarized)(PROMPT).logits
    assert torch.equal(harness.load(ternarized, dense=True)(PROMPT).logits, expected)


def test_packed_products_give_nearly_the_logits_of_the_dequantized_model(ternarized: Path) -> None:
    """They do not round alpha * t + mu to the dtype of the model, and differ by that rounding."""
    dense = with_plain_layers(ternarized)
    expected = dense(PROMPT).logits
    packed = harness.load(ternarized)(PROMPT).logits
    off = (packed - expected).abs().max() / expected.abs().max()
    assert off <= (1e-5 if dense.dtype == torch.float32 else 0.02)


def test_a_weight_that_is_made_for_the_reader_cannot_be_edited(quantized: Path) -> None:
    layer = harness.load(quantized).model.layers[1].mlp.up_proj
    assert layer.packed is not None
    assert torch.equal(layer.weight, harness.load(quantized, dense=True).model.layers[1].mlp.up_proj.weight)
    with torch.no_grad(), pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        layer.weight[3, 5] += 1


def test_a_loaded_model_takes_little_more_memory_than_its_file(quantized: Path) -> None:
    stored = sum(tensor.nbytes for _, tensor in tensors_of(quantized))
    for model in (harness.load(quantized), AutoModelForCausalLM.from_pretrained(quantized, dtype="auto")):
        tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
        assert sum(tensor.nbytes for tensor in tensors.values()) < 1.1 * stored


def test_other_tensors_can_be_loaded_into_packed_layers(quantized: Path) -> None:
    model = harness.load(quantized)
    changed = {
        name: -tensor if name.endswith((".scale", ".shift")) else tensor
        for name, tensor in model.state_dict().items()
    }
    twin = harness.load(quantized, dense=True)
    for other in (model, twin):
        other.load_state_dict(changed)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in model.state_dict().items())
    layer, dense = (other.model.layers[0].self_attn.k_proj for other in (model, twin))
    assert layer.packed is not None
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(layer(x), dense(x), rtol=0.01, atol=0.01)


def test_a_layer_off_the_cpu_has_dense_weights(quantized: Path) -> None:
    model = harness.load(quantized).to("meta")
    for layer in model.modules():
        if isinstance(layer, TernaryLinear):
            assert layer.packed is None
            assert layer.dense is not None
            assert layer.trits.dtype == torch.uint8
            assert layer(torch.empty(2, layer.in_features, device="meta")).shape == (2, layer.out_features)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(
    device: str, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **rest: pytest.fail("read"))
    with pytest.raises(UserError, match=f"the device {device} cannot be used: "):
        harness.load(quantized, device)


def test_codes_that_are_none_are_refused(words_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    config = TernaryConfig(block_size=tiny.BLOCK, grid="int8")
    run_workflow(tiny.make_model("llama"), folder, words_file, config)
    name = "model.layers.0.mlp.up_proj.shift"
    file = folder / weight_map(folder)[name]
    tensors = load_file(file)
    tensors[name][3, 1] = -128
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is damaged: it has a code beyond ±127"):
        harness.load(folder)


def test_a_symmetric_checkpoint_stores_no_shift(ternarized: Path) -> None:
    stored = json.loads((ternarized / "config.json").read_text())["quantization_config"]["symmetric"]
    shifts = [name for name, _ in tensors_of(ternarized) if name.rpartition(".")[2].startswith("shift")]
    assert bool(shifts) == (not stored)
    for dense in (False, True):
        model = harness.load(ternarized, dense=dense)
        layers = [module for module in model.modules() if isinstance(module, TernaryLinear)]
        assert layers
        assert all(("shift" in layer.stored()) == (not stored) for layer in layers)


def test_from_pretrained_reads_it_like_load(ternarized: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(ternarized, dtype="auto")
    expected = harness.load(ternarized)
    assert torch.equal(model(PROMPT).logits, expected(PROMPT).logits)
    assert model.state_dict().keys() == expected.state_dict().keys()
    tied = expected.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_what_is_saved_is_what_was_stored(ternarized: Path, tmp_path: Path) -> None:
    harness.load(ternarized).save_pretrained(tmp_path / "again")
    stored, saved = (dict(tensors_of(folder)) for folder in (ternarized, tmp_path / "again"))
    assert stored.keys() == saved.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor, saved[name]), name
    configs = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (ternarized, tmp_path / "again")
    ]
    assert configs[0] == configs[1]
    again = harness.load(tmp_path / "again")
    assert torch.equal(again(PROMPT).logits, harness.load(ternarized)(PROMPT).logits)


def test_a_checkpoint_is_saved_over_itself(damaged: Path) -> None:
    """From many files into one, whose index transformers leaves behind, and from that file into itself."""
    expected = harness.load(damaged)(PROMPT).logits
    for _ in range(2):
        harness.load(damaged).save_pretrained(damaged)
        assert (damaged / "model.safetensors").exists()
        assert (damaged / INDEX).exists()
        for model in (harness.load(damaged), AutoModelForCausalLM.from_pretrained(damaged, dtype="auto")):
            assert torch.equal(model(PROMPT).logits, expected)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "100KB"}])
def test_a_variant_is_saved_and_read(shards: dict[str, str], quantized: Path, tmp_path: Path) -> None:
    """Alone in a folder, and beside a checkpoint."""
    model = harness.load(quantized)
    beside = shutil.copytree(quantized, tmp_path / "beside")
    for folder in (tmp_path / "alone", beside):
        model.save_pretrained(folder, variant="fp16", **shards)
        again = AutoModelForCausalLM.from_pretrained(folder, variant="fp16", dtype="auto")
        assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    assert torch.equal(harness.load(beside)(PROMPT).logits, model(PROMPT).logits)
    with pytest.raises(
        UserError, match=r"only holds a variant of a checkpoint, model\.fp16.*safetensors; read"
    ):
        harness.load(tmp_path / "alone")


def test_a_damaged_variant_is_refused_by_name(quantized: Path, tmp_path: Path) -> None:
    harness.load(quantized).save_pretrained(tmp_path, variant="fp16")
    file = tmp_path / "model.fp16.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.trits"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the tensor model\.layers\.1\.mlp\.up_proj\.trits is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path, variant="fp16")


def test_saved_in_another_dtype_weights_are_still_those_that_calibration_saw(
    ternarized: Path, tmp_path: Path
) -> None:
    first = shutil.copytree(ternarized, tmp_path / "first")
    expected = weights_of(harness.load(first))
    for _ in range(2):
        harness.load(first).to(torch.float32).save_pretrained(tmp_path / "again")
        again = harness.load(tmp_path / "again")
        assert again.dtype == torch.float32
        assert all(torch.equal(*pair) for pair in zip(weights_of(again), expected, strict=True))
        again(PROMPT)
        # Checkpoints had no such entry at first.
        config = json.loads((first / "config.json").read_text())
        config["quantization_config"].pop("weight_dtype", None)
        (first / "config.json").write_text(json.dumps(config))


def test_edited_weights_are_not_lost_without_a_word(quantized: Path, tmp_path: Path) -> None:
    model = harness.load(quantized, dense=True)
    model.to(torch.float16).to(torch.float32).save_pretrained(tmp_path / "moved")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj were edited"):
        model.save_pretrained(tmp_path / "edited")


def test_a_model_that_initializes_projections_by_name_is_loaded(tmp_path: Path) -> None:
    """GPTBigCode's `_init_weights` takes `c_proj.weight`, which a ternary layer does not have yet."""
    config = transformers.GPTBigCodeConfig(
        vocab_size=tiny.VOCABULARY, n_positions=64, n_embd=tiny.WIDTH, n_layer=2, n_head=4
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    (tmp_path / "words.txt").write_text(tiny.words(400))
    run_workflow(model, tmp_path / "out", tmp_path / "words.txt", TernaryConfig(block_size=tiny.BLOCK))
    loaded = harness.load(tmp_path / "out", dense=True)
    assert torch.equal(loaded(PROMPT).logits, with_plain_layers(tmp_path / "out")(PROMPT).logits)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "no_such", 3])
def test_weights_of_a_type_that_no_model_has_are_refused(damaged: Path, dtype: object) -> None:
    config = json.loads((damaged / "config.json").read_text())
    config["quantization_config"]["weight_dtype"] = dtype
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="but must be one of bfloat16, float16, float32"):
        harness.load(damaged)


@pytest.mark.parametrize("ternarized", ["opt"], indirect=True)
def test_a_layer_with_a_bias_answers_in_the_type_of_its_input(ternarized: Path) -> None:
    model = harness.load(ternarized, dense=True)
    layer = next(module for module in model.modules() if isinstance(module, TernaryLinear))
    x = torch.ones(1, layer.in_features)
    y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, torch.nn.functional.linear(x, layer.weight.float(), layer.bias.float()))


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [layer.weight.float() for layer in model.modules() if isinstance(layer, TernaryLinear)]


def test_greedy_generation_is_that_of_the_dequantized_model(ternarized: Path) -> None:
    model, plain = harness.load(ternarized), with_plain_layers(ternarized)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = plain.generate(PROMPT, **options)
    assert torch.equal(model.generate(PROMPT, **options), expected)
    static = {"cache_implementation": "static", **options}
    assert torch.equal(model.generate(PROMPT, **static), plain.generate(PROMPT, **static))
    assert torch.equal(copy.deepcopy(model).generate(PROMPT, **options), expected)


@pytest.mark.parametrize("dense", [True, False])
def test_changing_the_dtype_leaves_alpha_and_mu_alone(dense: bool, quantized: Path) -> None:
    model = harness.load(quantized, dense=dense)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items() if "proj" in name}
    model.to(torch.float32)
    assert model.model.norm.weight.dtype == torch.float32
    logits = model(PROMPT).logits
    for change in (torch.float16, torch.bfloat16, torch.float64):
        model.to(change)
        for layer in model.model.layers:
            layer.float()
        for name, tensor in model.state_dict().items():
            if name in stored:
                assert tensor.dtype == stored[name].dtype
                assert torch.equal(tensor, stored[name]), (change, name)
    expected = with_plain_layers(quantized).to(torch.float32)(PROMPT).logits
    assert torch.equal(logits, expected) == dense
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)


def test_loaded_in_another_dtype_weights_are_those_that_calibration_saw(quantized: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32)
    wide = with_plain_layers(quantized).to(torch.float32)
    assert model.dtype == torch.float32
    tiny.keep_dense(model)
    assert torch.equal(model(PROMPT).logits, wide(PROMPT).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("ternarized", ["opt"], indirect=True)
def test_biases_are_loaded_in_the_dtype_that_was_asked_for(ternarized: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(ternarized, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model(PROMPT).logits, harness.load(ternarized).to(dtype)(PROMPT).logits)


def test_without_dense_weights_a_model_is_small(quantized: Path) -> None:
    sizes = []
    for dense in (True, False):
        layers = [m for m in harness.load(quantized, dense=dense).modules() if isinstance(m, TernaryLinear)]
        tensors = [tensor for layer in layers for tensor in layer.buffers()]
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        assert all((layer.dense is not None) == dense for layer in layers)
    # 16 bits a weight against 1.6, and 32 for every block of 64 or less.
    assert sizes[1] < 0.2 * sizes[0]


@pytest.mark.parametrize("lost", ["trits", "permutation"])
def test_from_pretrained_refuses_a_checkpoint_that_lacks_a_tensor(damaged: Path, lost: str) -> None:
    """transformers itself would warn, and fill the layer at random."""
    index = json.loads((damaged / INDEX).read_text())
    name = f"model.layers.1.mlp.up_proj.{lost}"
    file = damaged / index["weight_map"].pop(name)
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    (damaged / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"the tensor {name} is missing"):
        AutoModelForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize("columns", [1, 4, 5, 6, 23])
def test_trits_are_packed_unpacked_and_checked_as_in_the_reference(columns: int) -> None:
    trits = np.random.default_rng(columns).integers(-1, 2, size=(7, columns)).astype(np.int8)
    packed = torch.from_numpy(packing.pack_base3(trits))
    np.testing.assert_array_equal(unpack_base3(packed, columns).numpy(), trits)
    assert torch.equal(pack_base3(torch.from_numpy(trits)), packed)
    require_base3(packed, columns)
    for byte in range(256):
        changed = packed.clone()
        changed[-1, -1] = byte
        try:
            packing.unpack_base3(changed.numpy(), columns)
        except ValueError as error:
            with pytest.raises(ValueError, match=str(error)):
                require_base3(changed, columns)
        else:
            require_base3(changed, columns)


def test_a_ternary_model_is_measured_layer_by_layer_too(quantized: Path) -> None:
    model = harness.load(quantized, dense=False)
    windows = torch.randint(3, tiny.VOCABULARY, (2, 20))
    arguments = (windows, 40, "words")
    by_layers = perplexity.measure_by_layers(model, locate_layers(model), *arguments, Compute())
    assert by_layers == perplexity.measure(model, *arguments)
