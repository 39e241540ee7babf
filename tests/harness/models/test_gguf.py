"""GGUF files as original models: what the file says is what the model computes, or it is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type

from harness.errors import UserError
from harness.models.gguf import build_model
from harness.models.gguf_config import ARCHITECTURES, HARMLESS, NEUTRAL, describe
from harness.models.gguf_file import GgufFile
from harness.models.loading import load_original
from harness.runtimes.gguf_tokenizer import add_tokenizer
from tests.harness.export.checkpoints import byte_level
from tests.harness.models.gguf_cases import CASES, llama
from tests.harness.models.gguf_files import Content, logits, part_paths, tensors_of


def read(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    file = GgufFile(path)
    model, ignored = build_model(file, describe(file), dtype)
    assert not ignored
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_model_computes_what_the_file_says(name: str, tmp_path: Path) -> None:
    """As does the model whose config is saved and read again, which is how a checkpoint comes back."""
    expected, content = CASES[name].make()
    model = read(content.write(tmp_path / "a.gguf"))
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    for one in (model, again):
        torch.testing.assert_close(logits(one), logits(expected), rtol=2e-4, atol=2e-4)


def test_every_architecture_has_a_case() -> None:
    assert {case.architecture for case in CASES.values()} == ARCHITECTURES.keys()


def content_of(name: str = "llama") -> Content:
    return CASES[name].make()[1]


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2", "qwen35"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_once(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Norms less one and logarithms too, after they are computed in float32."""
    content = content_of(name)
    quantized = {
        own: Type.Q8_0 for own, data in content.tensors.items() if data.ndim == 2 and data.shape[1] % 32 == 0
    }
    content.kinds |= quantized
    content.write(tmp_path / "a.gguf")
    held = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors
    }
    model = read(tmp_path / "a.gguf", dtype)
    assert len(quantized) >= 13
    # Laid out as the file is, which moves rows and columns but changes no value.
    layout = Content(content.architecture, {}, tensors_of(model, content.architecture))
    for own, values in held.items():
        exact = torch.from_numpy(np.array(values))
        if own.endswith("norm.weight") and name in ("gemma3", "qwen35") and "ssm_norm" not in own:
            assert torch.equal(torch.from_numpy(layout.tensors[own]) - 1, (exact - 1).to(dtype).float())
        elif own.endswith(".ssm_a"):
            log = torch.log(-torch.from_numpy(layout.tensors[own]))
            torch.testing.assert_close(log, torch.log(-exact).to(dtype).float(), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(torch.from_numpy(layout.tensors[own]), exact.to(dtype).float())
    assert model.dtype == dtype


@pytest.mark.parametrize("kind", [kind for kind in Type if kind in gguf.quants._type_traits])
def test_every_type_of_block_is_read_as_gguf_reads_it(
    kind: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of a few rows, as large tensors are."""
    monkeypatch.setattr("harness.models.gguf_file.CHUNK", 1000)
    random = np.random.default_rng(0)
    shape = gguf.quant_shape_to_byte_shape((10, 256), kind)
    # Bytes up to 59 make finite scales of all types.
    data = random.integers(0, 60, shape, dtype=np.uint8)
    content = Content("llama", {}, {"a.weight": data}, {"a.weight": kind})
    file = GgufFile(content.write(tmp_path / "a.gguf"))
    exact = torch.from_numpy(gguf.dequantize(data, kind))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(file.tensor("a.weight", dtype), exact.to(dtype))


def refusal(content: Content, path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        read(content.write(path, **options))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("llama", {"attention.scale": 0.5}, "has the setting llama.attention.scale = 0.5, which no model"),
        ("llama", {"logit_scale": 0.0625}, "llama.logit_scale = 0.0625,"),
        ("llama", {"residual_scale": 0.5}, "llama.residual_scale = 0.5,"),
        ("llama", {"embedding_scale": 12.0}, "llama.embedding_scale = 12.0,"),
        ("qwen2", {"attn_logit_softcapping": 50.0}, "qwen2.attn_logit_softcapping = 50.0,"),
        ("qwen3", {"final_logit_softcapping": 30.0}, "qwen3.final_logit_softcapping = 30.0,"),
        ("gemma2", {"attention.scale": 0.5}, "gemma2.attention.scale = 0.5,"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping = 50.0,"),
        ("llama", {"attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv = 8.0,"),
        ("llama", {"attention.max_alibi_bias": 8.0}, "llama.attention.max_alibi_bias = 8.0,"),
        ("bloom", {"attention.max_alibi_bias": 4.0}, "bloom.attention.max_alibi_bias = 4.0,"),
        ("llama", {"attention.causal": False}, "llama.attention.causal = False,"),
        ("llama", {"use_parallel_residual": True}, "llama.use_parallel_residual = True,"),
        ("stablelm", {"use_parallel_residual": True}, "stablelm.use_parallel_residual = True,"),
        ("llama", {"a_key_of_tomorrow": 1}, "llama.a_key_of_tomorrow = 1,"),
        ("llama", {"attention.head_count": [4, 2]}, "llama.attention.head_count = [4, 2],"),
        ("llama", {"feed_forward_length": [96, 64]}, "llama.feed_forward_length = [96, 64],"),
        ("llama", {"attention.value_length": 8}, "llama.attention.value_length = 8,"),
        ("starcoder2", {"attention.key_length": 8, "attention.value_length": 8}, "attention.key_length = 8,"),
        ("llama with biases", {"attention.sliding_window": 8}, "llama.attention.sliding_window = 8,"),
        ("llama", {"attention.sliding_window_pattern": 2}, "llama.attention.sliding_window_pattern = 2,"),
        ("llama", {"rope.dimension_count": 8}, "llama.rope.dimension_count = 8,"),
        (
            "llama",
            {"rope.scaling.type": "dynamic", "rope.scaling.factor": 2.0},
            "rope.scaling.type = dynamic",
        ),
        ("llama", {"rope.scaling.type": "longrope"}, "llama.rope.scaling.type = longrope,"),
        ("llama", {"rope.scaling.alpha": 2.0}, "llama.rope.scaling.alpha = 2.0,"),
        ("llama", {"rope.scaling.attn_factor": 2.0}, "llama.rope.scaling.attn_factor = 2.0,"),
        ("llama with yarn", {"rope.scaling.yarn_ext_factor": 0.5}, "rope.scaling.yarn_ext_factor = 0.5,"),
        ("llama with yarn", {"rope.scaling.yarn_attn_factor": 2.0}, "rope.scaling.yarn_attn_factor = 2.0,"),
        ("llama", {"rope.scaling.factor": -2.0}, "rope.scaling.factor = -2.0,"),
        ("llama", {"rope.scaling.factor": float("nan")}, "rope.scaling.factor = nan,"),
        ("llama", {"rope.scaling.factor": "two"}, "rope.scaling.factor = two,"),
        ("llama", {"rope.freq_base": 0.0}, "rope.freq_base = 0.0,"),
        ("llama with yarn", {"rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier = 0.1,"),
        ("llama", {"rope.scaling.yarn_beta_fast": 8.0}, "llama.rope.scaling.yarn_beta_fast = 8.0,"),
        ("llama 3.1", {"rope.scaling.factor": 2.0}, "scales its rotary frequencies twice, by linear and"),
        ("mamba", {"ssm.dt_b_c_rms": True}, "mamba.ssm.dt_b_c_rms = True,"),
        ("falcon of 7B", {"rope.dimension_count": 4}, "falcon.rope.dimension_count = 4,"),
    ],
)
def test_a_setting_that_the_model_would_lack_is_refused_by_name(
    name: str, keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    content = content_of(name)
    content.keys = content.keys | keys
    assert message in refusal(content, tmp_path / "a.gguf")


def test_settings_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    content = content_of()
    content.keys = content.keys | NEUTRAL | dict.fromkeys(HARMLESS, "anything")
    content.general = {"general.name": "a", "vendor.key": 1, "tokenizer.ggml.pre": "default"}
    read(content.write(tmp_path / "a.gguf"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.keys.pop("context_length"), "lacks the key llama.context_length"),
        (
            lambda c: c.keys.pop("attention.layer_norm_rms_epsilon"),
            "lacks the key llama.attention.layer_norm",
        ),
        (lambda c: c.tensors.pop("blk.1.ffn_up.weight"), "lacks the tensors blk.1.ffn_up.weight"),
        (lambda c: c.tensors.pop("token_embd.weight"), "lacks the tensor token_embd.weight"),
        (
            lambda c: c.tensors.update({"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}),
            "has tensors that LlamaForCausalLM does not have: blk.0.attn_q_norm.weight",
        ),
        (
            lambda c: c.tensors.update({"blk.0.attn_norm.bias": np.ones(64, np.float32)}),
            "does not have: blk.0.attn_norm.bias",
        ),
        (
            lambda c: c.tensors.update({"blk.2.ffn_up.weight": np.ones((96, 64), np.float32)}),
            "does not have: blk.2.ffn_up.weight",
        ),
        (
            lambda c: c.tensors.update({"blk.1.attn_k.weight": np.ones((48, 64), np.float32)}),
            "has tensors of the wrong shape: blk.1.attn_k.weight",
        ),
        (
            lambda c: c.tensors.update({"blk.1.attn_q.weight": np.ones((31, 64), np.float32)}),
            "has tensors of the wrong shape: blk.1.attn_q.weight",
        ),
        (
            lambda c: c.tensors.update({"rope_freqs.weight": np.ones(7, np.float32)}),
            "the tensor rope_freqs.weight has 7 factors for 8 frequencies",
        ),
        (
            lambda c: c.tensors.update({"rope_factors_long.weight": np.ones(8, np.float32)}),
            "has the tensor rope_factors_long.weight without its counterpart",
        ),
        (
            lambda c: (
                c.tensors.update({"output_norm.weight": np.ones(64, np.int8)}),
                c.kinds.update({"output_norm.weight": Type.I8}),
            ),
            "the tensor output_norm.weight has the type I8, which the installed gguf cannot dequantize",
        ),
        (lambda c: c.keys.update({"expert_count": 8}), "has 8 experts in a layer (architecture llama)"),
        (
            lambda c: c.tensors.update({"blk.0.ffn_up_exps.weight": np.ones((2, 8, 64), np.float32)}),
            "has several experts in a layer (architecture llama); models with experts cannot be read",
        ),
        (
            lambda c: c.general.update({"general.type": "adapter"}),
            "holds no language model: its general.type is adapter",
        ),
        (
            lambda c: setattr(c, "architecture", "rwkv7"),
            "has the architecture rwkv7, which cannot be read from",
        ),
        (lambda c: setattr(c, "architecture", "rwkv7"), "or a file of llama, qwen2,"),
        (lambda c: setattr(c, "architecture", "clip"), "holds no language model: its general.type is model"),
    ],
)
def test_files_that_are_not_this_model_are_refused(
    change: Callable[[Content], Any], message: str, tmp_path: Path
) -> None:
    content = content_of()
    content.keys = dict(content.keys)
    change(content)
    assert message in refusal(content, tmp_path / "a.gguf")


@pytest.mark.parametrize(
    "keys", [{"attention.head_count": 0}, {"embedding_length": "wide"}, {"block_count": 0.5}]
)
def test_settings_that_make_no_sense_are_no_stack_trace(keys: dict[str, Any], tmp_path: Path) -> None:
    content = content_of()
    content.keys = content.keys | keys
    with pytest.raises(UserError, match=r"a\.gguf could not be read; is the file complete\?"):
        load_original(str(content.write(tmp_path / "a.gguf")))


def test_experts_are_named_before_the_architecture(tmp_path: Path) -> None:
    content = Content("qwen3moe", {"expert_count": 128}, content_of().tensors)
    message = refusal(content, tmp_path / "a.gguf")
    assert "has 128 experts in a layer (architecture qwen3moe); models with experts cannot be" in message


def test_an_architecture_newer_than_the_installed_gguf_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of("lfm2")
    content.write(tmp_path / "a.gguf")
    older = {arch: name for arch, name in gguf.MODEL_ARCH_NAMES.items() if name != "lfm2"}
    monkeypatch.setattr("gguf.MODEL_ARCH_NAMES", older)
    with pytest.raises(UserError, match="architecture lfm2, which the installed gguf does not know; upgrade"):
        describe(GgufFile(tmp_path / "a.gguf"))


def test_tensors_for_predicting_more_tokens_are_left_out_by_name(tmp_path: Path) -> None:
    expected, content = CASES["qwen35"].make()
    more = {
        name.replace("blk.1.", "blk.2."): data for name, data in content.tensors.items() if "blk.1." in name
    }
    content.keys = content.keys | {"block_count": 3, "nextn_predict_layers": 1}
    content.tensors = content.tensors | more
    file = GgufFile(content.write(tmp_path / "a.gguf"))
    model, ignored = build_model(file, describe(file), torch.float32)
    assert set(ignored) == more.keys()
    torch.testing.assert_close(logits(model), logits(expected), rtol=2e-4, atol=2e-4)


def test_special_tokens_are_those_of_the_file(tmp_path: Path) -> None:
    content = content_of()
    content.general = {"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.padding_token_id": 120}
    config = read(content.write(tmp_path / "a.gguf")).config
    # Not LlamaConfig's own; and a model of 120 tokens has no token 120.
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 7, None)


def test_a_file_in_parts_is_read_from_any_of_them(tmp_path: Path) -> None:
    expected, content = CASES["llama"].make()
    first = content.write(tmp_path / "a.gguf", parts=3)
    assert [part.name for part in part_paths(tmp_path / "a.gguf", 3)] == [
        "a-00001-of-00003.gguf",
        "a-00002-of-00003.gguf",
        "a-00003-of-00003.gguf",
    ]
    for part in part_paths(tmp_path / "a.gguf", 3):
        assert GgufFile(part).path == first
        assert torch.equal(logits(read(part)), logits(expected))


def test_the_tokenizer_is_in_the_first_part(tmp_path: Path) -> None:
    tokenizer = byte_level()
    case = llama({"vocab_size": 400}, vocab_size=400)
    expected, content = case.make()
    first = content.write(
        tmp_path / "a.gguf", parts=2, before=lambda writer: add_tokenizer(writer, tokenizer, expected.config)
    )
    original = load_original(str(part_paths(tmp_path / "a.gguf", 2)[1]), "float16")
    assert original.name == str(first)
    assert original.tokenizer("in here").input_ids == tokenizer("in here").input_ids
    weight = expected.model.layers[1].mlp.up_proj.weight
    assert torch.equal(original.model.model.layers[1].mlp.up_proj.weight, weight.half())


def test_parts_that_are_missing_renamed_or_of_another_file_are_refused(tmp_path: Path) -> None:
    content = content_of()
    parts = part_paths(tmp_path / "a.gguf", 3)

    def refused(part: Path) -> str:
        with pytest.raises(UserError) as error:
            GgufFile(part)
        return str(error.value)

    content.write(tmp_path / "a.gguf", parts=3)
    shutil.copy(parts[1], tmp_path / "b.gguf")
    assert "b.gguf is one of 3 parts; name them NAME-00001-of-00003.gguf" in refused(tmp_path / "b.gguf")
    parts[0].unlink()
    parts[2].unlink()
    assert "is one of 3 parts, and a-00001-of-00003.gguf, a-00003-of-00003.gguf is not" in refused(parts[1])
    assert "a-00001-of-00003.gguf does not exist" in refused(parts[0])
    content.write(tmp_path / "a.gguf", parts=3)
    shutil.copy(parts[1], parts[2])
    assert "a-00003-of-00003.gguf is not part 3 of 3" in refused(parts[0])
    content.write(tmp_path / "a.gguf", parts=3)
    dropped = Content("llama", content.keys, dict(list(content.tensors.items())[:-1]))
    other = tmp_path / "other"
    other.mkdir()
    dropped.write(other / "a.gguf", parts=3)
    shutil.copy(other / parts[2].name, parts[2])
    assert "belongs to a file of" in refused(parts[0])


def test_bytes_in_another_order_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(file, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_uint32("llama.block_count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"big\.gguf has its bytes in the order of another kind of machine"):
        GgufFile(file)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n"


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text(POINTER)
    message = rf"^{file} is a Git LFS pointer, not the file itself; run git lfs pull in"
    with pytest.raises(UserError, match=message):
        load_original(str(file))


@pytest.mark.parametrize("files", [[], ["config.json", "tokenizer.json"]])
def test_a_folder_of_gguf_files_only_says_to_pass_one(files: list[str], tmp_path: Path) -> None:
    for name in (*files, "b.gguf", "a.gguf"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"holds its weights as GGUF; pass the file, such as .*/a\.gguf"):
        load_original(str(tmp_path))
