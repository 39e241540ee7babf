"""Tokenizers from GGUF files give the ids that llama.cpp gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from harness.errors import UserError
from harness.models.gguf import embedded_gguf
from harness.models.gguf_tokenizer import read_tokenizer
from harness.models.tokenizer import load_tokenizer
from harness.models.word_splits import RULES
from tests.harness.models import llama_cpp
from tests.harness.models.llama_cpp import MARKED, TEXTS, WITH_MARKS, byte_level, sentencepiece

LLAMA_CPP = json.loads(llama_cpp.IDS.read_text())
GROUPS = {group["names"][0]: group for group in LLAMA_CPP["byte-level"]}


def ids(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text).input_ids for text in TEXTS]


def test_rules_are_equal_where_llama_cpp_gives_equal_ids() -> None:
    ours: dict[Any, list[str]] = {}
    for name, rule in RULES.items():
        ours.setdefault(rule, []).append(name)
    assert sorted(ours.values()) == sorted(group["names"] for group in GROUPS.values())


@pytest.mark.parametrize("name", GROUPS)
def test_words_are_split_by_the_rule_that_the_file_names(name: str, tmp_path: Path) -> None:
    found = dict(zip(TEXTS, ids(read_tokenizer(byte_level(tmp_path / "a.gguf", name))), strict=True))
    expected = dict(zip(TEXTS, GROUPS[name]["ids"], strict=True))
    if name in WITH_MARKS:
        del found[MARKED], expected[MARKED]
    assert found == expected


@pytest.mark.parametrize(
    ("name", "said"), [(None, "does not say how"), ("new-2", "by the rule 'new-2', which")]
)
def test_a_rule_that_is_not_known_is_named(
    name: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp refuses the second; the first it takes for its default."""
    tokenizer = read_tokenizer(byte_level(tmp_path / "a.gguf", name))
    streams = capsys.readouterr()
    assert said in streams.err
    assert (streams.out, streams.err.count("\n")) == ("", 1)
    assert ids(tokenizer) == LLAMA_CPP["unnamed"]


@pytest.mark.parametrize(("prefix", "key"), [(True, "prefix"), (None, "prefix"), (False, "no prefix")])
def test_a_space_is_prepended_as_the_file_says(prefix: bool | None, key: str, tmp_path: Path) -> None:
    assert ids(read_tokenizer(sentencepiece(tmp_path / "a.gguf", prefix))) == LLAMA_CPP[key]


def test_the_default_model_has_its_own_tokenizer() -> None:
    assert ids(read_tokenizer(embedded_gguf())) == LLAMA_CPP["embedded"]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"])
def test_a_saved_tokenizer_keeps_the_rules(kind: str, tmp_path: Path) -> None:
    """transformers has a tokenizer class for each of these architectures, with rules of its own."""
    for at, file in enumerate((byte_level(tmp_path / "a", "falcon"), sentencepiece(tmp_path / "b", False))):
        tokenizer = read_tokenizer(file)
        folder = tmp_path / f"{at}"
        tokenizer.save_pretrained(folder)
        transformers.AutoConfig.for_model(kind).save_pretrained(folder)
        back = load_tokenizer(folder)
        assert ids(back) == ids(tokenizer)
        assert back.special_tokens_map == tokenizer.special_tokens_map


@pytest.mark.parametrize("name", ["smollm", "llama-bpe", None])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_tokens_around_a_text_are_those_that_the_file_asks_for(
    name: str | None, bos: bool, eos: bool, tmp_path: Path
) -> None:
    around = {"add_bos_token": bos, "add_eos_token": eos}
    path = tmp_path / "a.gguf"
    tokenizer = read_tokenizer(
        byte_level(path, name, **around) if name else sentencepiece(path, True, **around)
    )
    bare = tokenizer("two", add_special_tokens=False).input_ids
    first, last = (tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>"))
    assert tokenizer("two").input_ids == [first] * bos + bare + [last] * eos


def test_tokens_around_a_text_that_are_not_said_are_refused(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "a.gguf", "llama-bpe", bos_token_id=None)
    with pytest.raises(UserError, match=r"a\.gguf adds a bos_token to every text, but does not say which"):
        read_tokenizer(path)


def test_an_id_that_no_token_has_is_no_role(tmp_path: Path) -> None:
    for file in (
        byte_level(tmp_path / "a", "smollm", pad_token_id=2**32 - 1),
        sentencepiece(tmp_path / "b", True, pad_token_id=10**6),
    ):
        assert read_tokenizer(file).pad_token is None


def test_a_token_listed_twice_is_refused(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "a.gguf", "smollm", more=["two", "two"])
    with pytest.raises(UserError, match=r"a\.gguf lists the token 'two' twice"):
        read_tokenizer(path)


def test_text_comes_back_from_its_ids(tmp_path: Path) -> None:
    for file in (byte_level(tmp_path / "a", "tekken"), sentencepiece(tmp_path / "b", True)):
        tokenizer = read_tokenizer(file)
        for text in TEXTS[:14]:  # without special tokens, beside which a space was prepended
            assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_llama_cpp_still_gives_these_ids(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    for name, group in GROUPS.items():
        assert llama_cpp.ids_of_llama_cpp(byte_level(tmp_path / "a.gguf", name)) == group["ids"]
    for prefix, key in ((True, "prefix"), (False, "no prefix")):
        assert llama_cpp.ids_of_llama_cpp(sentencepiece(tmp_path / "a.gguf", prefix)) == LLAMA_CPP[key]
