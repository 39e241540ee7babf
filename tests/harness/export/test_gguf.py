"""GGUF files against the checkpoint's bytes, read by transformers, gguf and this package."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import harness
from harness.cli import EXIT_USAGE
from harness.errors import UserError
from harness.export.__main__ import main as export_main
from harness.models.gguf_tokenizer import read_tokenizer
from harness.models.word_splits import RULES, Rule, pre_tokenizer
from harness.perplexity import measure
from harness.runtimes.gguf_tokenizer import add_tokenizer
from tests.harness import tiny
from tests.harness.export.checkpoints import (
    KINDS,
    LLAMA3_SPLIT,
    QWEN2_SPLIT,
    SIZES,
    TEXT,
    Run,
    byte_level,
    code_cache,
    config_of,
    raw,
    raw_grid,
    read_gguf,
    sentencepiece,
    to_gguf,
    with_own_code,
    wrapped,
    write,
)


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_loads_with_transformers_as_the_formula_says(kind: str, run_main: Run, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", config_of(kind))
    model = read_gguf(to_gguf(run_main, folder, tmp_path / "a.gguf"))
    tensors, modules, _ = raw(folder)
    assert len(modules) == 14
    for name in modules:
        t, alpha, mu = raw_grid(folder, name)
        m = (mu - alpha).half().float()
        # The one rounding of a product and a sum is float32's, in transformers as here.
        assert torch.equal(model.get_submodule(name).weight, alpha.float() * (t + 1) + m)
    stored = model.state_dict()
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] not in ("trits", "scale", "shift"):
            assert torch.equal(stored[name], tensor)
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied == ("lm_head.weight" not in tensors)

    # Weights move by 2^-11 of mu - alpha at most, each block's as one: the logits by not much more.
    original = harness.load(folder)
    tokens = torch.randint(3, 390, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = original(tokens).logits, model(tokens).logits
    assert (expected - got).abs().max() < 4e-3 * expected.abs().max()


def test_rows_of_q_and_k_are_in_the_order_of_llama_cpp(plain: Path, run_main: Run, tmp_path: Path) -> None:
    """Row 2i of a head is its row i, row 2i + 1 its row i + 16; v keeps its order."""
    reader = gguf.GGUFReader(to_gguf(run_main, plain, tmp_path / "a.gguf"))
    held = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    weights = harness.load(plain).model.layers[1].self_attn
    for part, heads in (("q", 4), ("k", 2)):
        rows = getattr(weights, f"{part}_proj").weight.detach().numpy()
        for head in range(heads):
            for i in range(16):
                for half in (0, 1):
                    written = held[f"blk.1.attn_{part}.weight"][32 * head + 2 * i + half]
                    np.testing.assert_allclose(written, rows[32 * head + 16 * half + i], atol=2e-4)
    np.testing.assert_allclose(held["blk.1.attn_v.weight"], weights.v_proj.weight.detach(), atol=2e-4)


def test_a_bfloat16_model_stays_one(run_main: Run, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", config_of("untied"), dtype=torch.bfloat16)
    file = to_gguf(run_main, folder, tmp_path / "a.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "BF16"
    assert kinds["blk.0.ffn_down.weight"] == "Q4_1"
    assert kinds["output_norm.weight"] == "F32"
    model, tensors = read_gguf(file, torch.bfloat16), raw(folder)[0]
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(model.state_dict()[name], tensors[name])


def test_a_block_that_holds_a_whole_row_may_have_any_size(run_main: Run, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", config_of("tied"), block_size=1000)
    model = read_gguf(to_gguf(run_main, folder, tmp_path / "a.gguf"))
    t, alpha, mu = raw_grid(folder, "model.layers.0.mlp.down_proj")
    weight = model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(weight, alpha.float() * (t + 1) + (mu - alpha).half().float())


def split(regex: str) -> Any:
    return pre_tokenizers.Split(Regex(regex), "isolated")


# The steps that the tokenizers have from which these names come.
SPLITS = {
    "gpt-2": lambda: byte_level(),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "qwen2": lambda: byte_level(split(QWEN2_SPLIT), own_split=False),
    "dbrx": lambda: byte_level(split(LLAMA3_SPLIT), own_split=False),
    "llama-bpe": lambda: byte_level(split(LLAMA3_SPLIT), own_split=False, ignore_merges=True),
    "deepseek-coder": lambda: byte_level(
        split("[\r\n]"),
        split(r"\s?\p{L}+"),
        split(r"\s?\p{P}+"),
        split("[一-龥ࠀ-一가-퟿]+"),
        pre_tokenizers.Digits(individual_digits=True),
        own_split=False,
    ),
    "default": sentencepiece,
}


@pytest.mark.parametrize("pre", SPLITS)
def test_the_tokenizer_comes_back(pre: str, run_main: Run, tmp_path: Path) -> None:
    tokenizer = SPLITS[pre]()
    folder = write(tmp_path / "checkpoint", config_of("tied"), tokenizer)
    file = to_gguf(run_main, folder, tmp_path / "a.gguf")
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.pre"].contents() == pre
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 400
    assert tokens[-1] == "[PAD399]"
    assert [fields["tokenizer.ggml.token_type"].contents()[i] for i in (0, 1, 399)] == [
        gguf.TokenType.UNKNOWN if pre == "default" else gguf.TokenType.CONTROL,
        gguf.TokenType.CONTROL,
        gguf.TokenType.UNUSED,
    ]
    back = read_tokenizer(file)
    assert [back.bos_token_id, back.eos_token_id, back.pad_token_id] == [1, 2, 0]
    assert back.chat_template == tokenizer.chat_template
    assert back(TEXT).input_ids == tokenizer(TEXT).input_ids
    if pre in ("gpt-2", "qwen2", "dbrx", "llama-bpe"):  # transformers reads others as the first
        peer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        assert peer(TEXT).input_ids == tokenizer(TEXT).input_ids
    if pre == "default":
        scores = fields["tokenizer.ggml.scores"].contents()
        merged = [token for token, _ in sorted(zip(tokens, scores, strict=True), key=lambda t: -t[1])]
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        in_order = list(dict.fromkeys("".join(merge) for merge in merges))
        assert [token for token in merged if token in set(in_order)] == in_order


def split_by(rule: Rule) -> Any:
    tokenizer = byte_level(ignore_merges=rule.ignore_merges)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer(rule)
    return tokenizer


def written(tokenizer: Any, key: str) -> Any:
    writer = gguf.GGUFWriter(None, "llama")
    add_tokenizer(writer, tokenizer, config_of("tied"))
    return writer.kv_data[0][f"tokenizer.ggml.{key}"].value


@pytest.mark.parametrize("name", RULES)
def test_every_rule_that_is_read_can_be_written(name: str) -> None:
    found, rule = RULES[written(split_by(RULES[name]), "pre")], RULES[name]
    assert (found.splits, found.ignore_merges) == (rule.splits, rule.ignore_merges)


def test_words_that_merges_do_not_lead_to_are_not_lost() -> None:
    """llama.cpp concludes from the name of the rule whether merges are ignored."""
    tokenizer = split_by(replace(RULES["qwen2"], ignore_merges=True))
    assert written(tokenizer, "pre") == "qwen2"  # as each token has merges
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["model"]["merges"].pop()
    with pytest.raises(UserError, match=r"takes words such as '.+' whole, and splits text as qwen2"):
        written(wrapped(Tokenizer.from_str(json.dumps(rules))), "pre")


@pytest.mark.parametrize(("scheme", "prepends"), [("always", True), ("first", True), ("never", False)])
def test_a_prepended_space_is_stated(scheme: str, prepends: bool) -> None:
    tokenizer = sentencepiece()
    assert written(tokenizer, "add_space_prefix") is True
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    assert written(tokenizer, "add_space_prefix") is prepends


def test_a_split_at_spaces_that_are_gone_is_none() -> None:
    """Gemma's tokenizer has one."""
    tokenizer = sentencepiece()
    backend, space = tokenizer.backend_tokenizer, "\u2581"
    backend.normalizer = normalizers.Replace(" ", space)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    assert written(tokenizer, "add_space_prefix") is False
    backend.normalizer = None
    with pytest.raises(UserError, match="prepares text by Split"):
        written(tokenizer, "add_space_prefix")


def test_tokens_around_a_text_are_stated(run_main: Run, tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    folder = write(tmp_path / "checkpoint", config_of("tied"), tokenizer)
    fields = gguf.GGUFReader(to_gguf(run_main, folder, tmp_path / "a.gguf")).fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.add_eos_token"].contents() is False


@pytest.mark.parametrize("default", [{"default": "{{ messages }}"}, {}])
def test_chat_templates_for_other_uses_go_by_their_names(
    default: dict[str, str], run_main: Run, tmp_path: Path
) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {**default, "tool_use": "{{ tools }}", "rag-2": "{{ documents }}"}
    folder = write(tmp_path / "checkpoint", config_of("tied"), tokenizer)
    file = to_gguf(run_main, folder, tmp_path / "a.gguf")
    fields = gguf.GGUFReader(file).fields
    expected: dict[str, Any] = {
        "tokenizer.chat_templates": ["rag_2", "tool_use"],
        "tokenizer.chat_template.rag_2": "{{ documents }}",
        "tokenizer.chat_template.tool_use": "{{ tools }}",
    }
    if default:
        expected["tokenizer.chat_template"] = default["default"]
    assert {key: field.contents() for key, field in fields.items() if ".chat_template" in key} == expected
    assert read_tokenizer(file).chat_template == default.get("default")


def test_the_tokenizer_s_own_tokens_are_written_whatever_its_template_ends_with(
    run_main: Run, tmp_path: Path
) -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    tokenizer.eos_token = "<pad>"
    folder = write(tmp_path / "checkpoint", config_of("tied"), tokenizer)
    fields = gguf.GGUFReader(to_gguf(run_main, folder, tmp_path / "a.gguf")).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
    assert fields["tokenizer.ggml.add_eos_token"].contents() is False


def overflow(scale: np.ndarray, shift: np.ndarray) -> None:
    scale[2], shift[2] = -6e4, 6e4


def dynamic_rope() -> Any:
    return transformers.LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    )


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            tiny.CONFIGS["opt"],
            {},
            "GGUF export does not support opt models, only llama, mistral",
        ),
        (
            lambda: transformers.LlamaConfig(**{**SIZES, "intermediate_size": 176}),
            {},
            "cannot hold model.layers.0.mlp.down_proj, as it needs rows of a multiple of 32 columns, not 176",
        ),
        (
            lambda: config_of("tied"),
            {"block_size": 48},
            "a --block-size that is a multiple of 32, not 48",
        ),
        (lambda: config_of("tied"), {"tokenizer": tiny.make_tokenizer()}, "tokenizer is WordLevel, for wh"),
        (lambda: config_of("tied"), {"change": overflow}, "mu - alpha of a block overflows float16"),
        (dynamic_rope, {}, "its rope scaling (dynamic) would be lost"),
        (lambda: transformers.Qwen3Config(**SIZES, attention_bias=True), {}, "q_proj.bias would be lost"),
        (lambda: transformers.LlamaConfig(**SIZES, hidden_act="gelu"), {}, "its activation gelu would be"),
        (
            lambda: transformers.SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
            {},
            "llama.cpp leaves out rotary embeddings in every fourth layer",
        ),
        (
            lambda: config_of("tied"),
            {"tokenizer": byte_level(pre_tokenizers.Whitespace())},
            "splits words by Whitespace and ByteLevel, for which GGUF has no name",
        ),
        (
            lambda: transformers.LlamaConfig(**{**SIZES, "vocab_size": 300}),
            {},
            "its tokenizer has token 389, but the model has only 300 tokens",
        ),
    ],
)
def test_what_gguf_cannot_hold_is_refused(
    config: Callable[[], Any],
    options: dict[str, Any],
    message: str,
    run_main: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = write(tmp_path / "checkpoint", config(), **options), tmp_path / "a.gguf"
    assert run_main(export_main, folder, "--format", "gguf", "--out", out) == EXIT_USAGE
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_code_that_comes_with_a_model_cannot_go_into_gguf(
    plain: Path, run_main: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it goes by the name of an architecture that GGUF has."""
    folder, out = with_own_code(plain, tmp_path / "own", "llama"), tmp_path / "a.gguf"
    arguments = (folder, "--format", "gguf", "--out", out, "--trust-remote-code")
    with code_cache(tmp_path / "modules"):
        assert run_main(export_main, *arguments) == EXIT_USAGE
    assert "the Python code shipped with it would be lost" in capsys.readouterr().err
    assert not out.exists()


def test_perplexity_of_an_export_is_the_checkpoint_s(plain: Path, run_main: Run, tmp_path: Path) -> None:
    model = read_gguf(to_gguf(run_main, plain, tmp_path / "a.gguf"))
    windows = torch.randint(3, 390, (3, 30), generator=torch.Generator().manual_seed(2))
    got, expected = (measure(m, windows, 90, "random").value for m in (model, harness.load(plain)))
    assert got == pytest.approx(expected, rel=2e-3)
