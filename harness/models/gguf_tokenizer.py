"""Build the tokenizer that a GGUF file describes.

transformers reads vocabulary and merges of such a file, but takes most rules from the tokenizer class that it
picks: it knows few of the named word splits, prepends a space whatever the file says, and cuts up special
tokens that are not spelled in bytes. Here text is tokenized as llama.cpp does, which does not normalize it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
from gguf import Keys, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from harness.errors import UserError
from harness.models.original import quiet_transformers
from harness.models.word_splits import RULES, Rule, pre_tokenizer
from harness.progress import say_on_stderr

SPACE = "\u2581"  # SentencePiece's symbol for a space

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"

# Their files have no merges, and scores that are not in the order of the merges; transformers restores it.
OWN_ORDER = ("gemma", "gemma2", "gemma3")

# llama.cpp takes this rule where a file names none.
DEFAULT = "default"

_ROLES = {
    "bos_token": Keys.Tokenizer.BOS_ID,
    "eos_token": Keys.Tokenizer.EOS_ID,
    "unk_token": Keys.Tokenizer.UNK_ID,
    "pad_token": Keys.Tokenizer.PAD_ID,
}
_SENTENCEPIECE_IDS = {Keys.Tokenizer.BOS_ID: 1, Keys.Tokenizer.EOS_ID: 2, Keys.Tokenizer.UNK_ID: 0}

Read = Callable[..., Any]


def read_tokenizer(path: Path) -> Any:
    """Build the tokenizer of a GGUF file.

    A line on stderr says so if the file names a word split that is not known, or none.

    Returns
    -------
    transformers.PreTrainedTokenizerFast

    Raises
    ------
    UserError
        If the file lists a token twice, or adds bos or eos to a text without saying which token that is.
    """
    transformers = quiet_transformers()
    fields = gguf.GGUFReader(path).fields

    def read(key: str, default: Any = None) -> Any:
        return fields[key].contents() if key in fields else default

    model = read(Keys.Tokenizer.MODEL)
    own_order = read(Keys.General.ARCHITECTURE) in OWN_ORDER
    if model not in (BYTE_LEVEL, SENTENCEPIECE) or (model == SENTENCEPIECE and own_order):
        return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    # A vocabulary may have several empty tokens; llama.cpp gives them these names.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(read(Keys.Tokenizer.LIST))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise UserError(f"{path} lists the token {twice!r} twice; its tokenizer is damaged")
    ids = _SENTENCEPIECE_IDS if model == SENTENCEPIECE else {}
    stated = {role: read(key, ids.get(key)) for role, key in _ROLES.items()}
    # Files have ids that no token has; llama.cpp takes such a role as not given.
    roles = {role: tokens[i] for role, i in stated.items() if i is not None and i < len(tokens)}
    if model == BYTE_LEVEL:
        rule = _rule(path, read(Keys.Tokenizer.PRE))
        tokenizer, add_bos = _byte_level(vocabulary, read, rule), rule.add_bos
    else:
        tokenizer, add_bos = _sentencepiece(vocabulary, read, roles.get("unk_token")), True
    kinds = read(Keys.Tokenizer.TOKEN_TYPE, ())
    for kind, add in (
        (TokenType.CONTROL, tokenizer.add_special_tokens),
        (TokenType.USER_DEFINED, tokenizer.add_tokens),
    ):
        whole = (token for token, own in zip(tokens, kinds, strict=False) if own == kind)
        add([AddedToken(token, normalized=False, special=kind == TokenType.CONTROL) for token in whole])
    surrounds = {
        "add_bos_token": read(Keys.Tokenizer.ADD_BOS, add_bos),
        "add_eos_token": read(Keys.Tokenizer.ADD_EOS, False),
    }
    for setting, added in surrounds.items():
        role = setting.removeprefix("add_")
        if added and role not in roles:
            raise UserError(f"{path} adds a {role} to every text, but does not say which token that is")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=read(Keys.Tokenizer.CHAT_TEMPLATE),
        **roles,
        **surrounds,
    )


def _rule(path: Path, name: str | None) -> Rule:
    if name not in RULES:
        what = (
            "does not say how words are split"
            if name is None
            else f"splits words by the rule {name!r}, which is not known here"
        )
        say_on_stderr(
            f"{path} {what}; its text is split by llama.cpp's default rule, and token ids may be wrong"
        )
        name = DEFAULT
    return RULES[name]


def _byte_level(vocabulary: dict[str, int], read: Read, rule: Rule) -> Tokenizer:
    """Byte-level BPE."""
    tokenizer = Tokenizer(
        BPE(vocab=vocabulary, merges=_stated_merges(read), ignore_merges=rule.ignore_merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizer(rule)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: dict[str, int], read: Read, unknown: str | None) -> Tokenizer:
    """BPE over characters with bytes to fall back on.

    SentencePiece prepends a space to a text that begins with spaces too, which `Metaspace` does not.
    """
    merges = _stated_merges(read) or _merges(vocabulary, read(Keys.Tokenizer.SCORES))
    tokenizer = Tokenizer(
        BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prepends = read(Keys.Tokenizer.ADD_PREFIX, True)
    steps = [normalizers.Prepend(SPACE)] if prepends else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prepends else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _stated_merges(read: Read) -> list[tuple[str, str]]:
    """The merges in the file. A space separates their halves; the first half may begin with one."""
    merges = []
    for merge in read(Keys.Tokenizer.MERGES, ()):
        at = merge.index(" ", 1)
        merges.append((merge[:at], merge[at + 1 :]))
    return merges


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs that make a token, in the order in which SentencePiece would join them: by its score."""
    return [
        (token[:at], token[at:])
        for _, token in sorted(zip(scores, vocabulary, strict=True), key=lambda scored: -scored[0])
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
