"""Write a tokenizer's vocabulary, merges and rules as GGUF metadata.

GGUF stores the names of a tokenizer's rules, not the rules, so only rules with a name can be written:
byte-level BPE ("gpt2") with one of the word splits in `harness.models.word_splits`, and SentencePiece BPE
over characters with byte fallback ("llama").
"""

from __future__ import annotations

import json
import re
from typing import Any

import gguf
from gguf import Keys, TokenType
from tokenizers import Tokenizer

from harness.models.word_splits import RULES, splits_of
from harness.runtimes.features import Refused

SPACE = "\u2581"  # SentencePiece's symbol for a space


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, config: Any) -> None:
    """Write a tokenizer's metadata.

    Parameters
    ----------
    writer : gguf.GGUFWriter
        Writer of the GGUF file.
    tokenizer : transformers.PreTrainedTokenizerBase
        Tokenizer of the checkpoint.
    config : transformers.PreTrainedConfig
        Config of the model: its vocabulary size, and special tokens that the tokenizer does not name.

    Raises
    ------
    Refused
        If GGUF has no name for the tokenizer's rules, or the tokenizer has more tokens than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown(f"is a {type(tokenizer).__name__}")
    rules = json.loads(backend.to_str())
    model = rules["model"]
    if model.get("type") != "BPE":
        raise _unknown(f"is {model.get('type')}")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_prepends_space(rules))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_word_split(rules))

    tokens, types = _tokens(tokenizer, model, config.vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if model.get("byte_fallback"):
        writer.add_token_scores(_scores(tokens, merges))
    writer.add_token_merges(merges)

    # gguf.SpecialVocab would read other values from the files: it takes a template's last token as eos, even
    # if the tokenizer has another eos. Without a template it omits add_bos_token, and llama.cpp then adds bos
    # for "llama".
    first, last = _surrounds(tokenizer)
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    for kind, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        found = getattr(tokenizer, f"{kind}_token_id", None)
        if found is None:
            found = getattr(config, f"{kind}_token_id", None)
        if isinstance(found, int):
            add(found)
    _add_chat_templates(writer, tokenizer.chat_template)


def _add_chat_templates(writer: gguf.GGUFWriter, templates: str | dict[str, str] | None) -> None:
    """Write the default chat template, and named templates by their names."""
    if templates is None:
        return
    named = {"default": templates} if isinstance(templates, str) else dict(templates)
    default = named.pop("default", None)
    # add_chat_template accepts all templates too, but lists their names in a different order at every run.
    for name, template in sorted(named.items()):
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=_key(name)), template)
    if named:
        writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, [_key(name) for name in sorted(named)])
    if default is not None:
        writer.add_chat_template(default)


def _key(name: str) -> str:
    """Replace the characters of a name that gguf does not allow in a key."""
    return re.sub("[^A-Za-z0-9]", "_", name)


def _unknown(what: str) -> Refused:
    return Refused(
        f"its tokenizer {what}, for which GGUF has no name; without a tokenizer the file would "
        "not run. Supported are SentencePiece BPE with byte fallback, and byte-level BPE with a word split "
        "that has a name"
    )


def _word_split(rules: dict[str, Any]) -> str:
    """Find GGUF's name for the word split before byte-level BPE."""
    steps = _steps(rules["pre_tokenizer"], "pretokenizers")
    splits = splits_of(steps)
    names = [name for name, rule in RULES.items() if rule.splits == splits]
    if not names:
        raise _unknown(f"splits words by {' and '.join(step['type'] for step in steps) or 'nothing'}")
    # llama.cpp expects text in NFC already.
    normalizers = [step["type"] for step in _steps(rules["normalizer"], "normalizers")]
    if normalizers not in ([], ["NFC"]):
        raise _unknown(f"normalizes text by {' and '.join(normalizers)}")
    ignores = bool(rules["model"].get("ignore_merges"))
    exact = [name for name in names if RULES[name].ignore_merges == ignores]
    unmerged = None if exact else _unmerged(rules)
    if unmerged:
        how = "takes" if ignores else "does not take"
        raise _unknown(f"{how} words such as {unmerged!r} whole, and splits text as {names[0]}")
    return (exact or names)[0]


def _unmerged(rules: dict[str, Any]) -> str | None:
    """Find a token that merges do not lead to."""
    model = {**rules["model"], "ignore_merges": False}
    merging = Tokenizer.from_str(json.dumps({**rules, "model": model})).model
    added = {token["content"] for token in rules["added_tokens"]}
    return next((t for t in model["vocab"] if t not in added and len(merging.tokenize(t)) > 1), None)


def _prepends_space(rules: dict[str, Any]) -> bool:
    """Whether a tokenizer with SentencePiece's spaces prepends a space to the text."""
    steps = [*_steps(rules["normalizer"], "normalizers"), *_steps(rules["pre_tokenizer"], "pretokenizers")]
    prepends = replaces = False
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prepends = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            replaces = True
        elif step["type"] == "Metaspace" and step["replacement"] == SPACE:
            replaces = True
            prepends = step.get("prepend_scheme", "always") != "never"
        elif replaces and step["type"] == "Split" and step["pattern"] == {"String": " "}:
            pass  # as Gemma does: no space is left to split at
        else:
            raise _unknown(f"prepares text by {step['type']}")
    if not replaces:
        raise _unknown("does not write spaces as SentencePiece does")
    return prepends


def _steps(rule: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if rule is None:
        return []
    return list(rule[key]) if rule["type"] == "Sequence" else [rule]


def _tokens(tokenizer: Any, model: dict[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """List all tokens of the model's vocabulary, and their types."""
    vocabulary = {**model["vocab"], **tokenizer.get_added_vocab()}
    if max(vocabulary.values()) >= size:
        raise Refused(
            f"its tokenizer has token {max(vocabulary.values())}, but the model has only {size} tokens; "
            "they do not belong together"
        )
    tokens, types = [f"[PAD{i}]" for i in range(size)], [TokenType.UNUSED] * size
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, TokenType.NORMAL
        if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token[5] == ">":
            types[i] = TokenType.BYTE
    for i, added in tokenizer.added_tokens_decoder.items():
        types[i] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    unknown = model["vocab"].get(model.get("unk_token") or "")
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Score tokens so that SentencePiece, which joins the best pair first, merges in the given order."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _surrounds(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer adds bos before a text, and eos after it."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    return whole[0] != bare[0] and whole[0] == tokenizer.bos_token_id, (
        whole[-1] != bare[-1] and whole[-1] == tokenizer.eos_token_id
    )
