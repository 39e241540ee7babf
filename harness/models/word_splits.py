"""The rules by which byte-level BPE splits text into words, under the names that GGUF gives them.

A GGUF file names a rule (`tokenizer.ggml.pre`) and does not contain it. The regular expressions are those of
the tokenizers that the names come from. llama.cpp's engine knows fewer classes of characters and simplifies
some, so its ids may differ: with the rules of Tekken and GPT-4o around marks and where a capital follows a
small letter, with those of DeepSeek LLM and Coder around spaces, in each case outside ASCII only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

# GPT-2's rule, which `ByteLevel` of tokenizers has built in.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_DIGIT = r"\p{N}"
_NUMBER = r"\p{N}+"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_SIGNS_AND_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_ENGLISH}|{_WORD}|\p{{N}}{{1,3}}{_SIGNS}{_SPACES}"
_QWEN2 = rf"{_ENGLISH}|{_WORD}|\p{{N}}{_SIGNS}{_SPACES}"
_QWEN35 = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_SPACES}"
)

# A capital may begin a word, and capitals may be one, but no capital follows a small letter.
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}{_SIGNS_AND_SLASHES}{_SPACES}"
_GPT4O = rf"{_CASED[0]}{_ENGLISH}?|{_CASED[1]}{_ENGLISH}?|\p{{N}}{{1,3}}{_SIGNS_AND_SLASHES}{_SPACES}"

_SEED_CODER = rf"{_ENGLISH}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_SPACES}"
_MINICPM5 = rf"{_ENGLISH}|{_WORD}|\p{{N}}+{_SIGNS}{_SPACES}"
_UFAKZEKA = rf"{_WORD}|\p{{N}}{_SIGNS}{_SPACES}"
_JAIS2 = (
    rf"{_ENGLISH}|{_WORD}|\p{{N}}{{1,3}}{_SIGNS}|\s*[\r\n]+|"
    + "".join(rf"\s{{{count}}}(?!\S)|" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
    + r"\s{1}"
)
_EXAONE = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"

# DeepSeek lists the letters that have a case, and the characters of Chinese, Japanese and Korean.
_CASED_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b"
    "\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124"
    "\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_SIGNS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_SIGN_AND_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_DEEPSEEK3 = (
    rf"{_SIGN_AND_WORD}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*{_SPACES}"
)


@dataclass(frozen=True)
class Rule:
    """How byte-level BPE splits text, and what else llama.cpp concludes from the name of the rule.

    Each regular expression in `splits` splits the pieces that those before it left, into its matches and what
    lies between them. If `ignore_merges`, a word that is a token is not built by merges. `add_bos` says
    whether bos comes before a text if the file does not say so.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_NAMES = (
    (Rule((GPT2,)), "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4"),
    (Rule((_DIGIT, GPT2)), "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (Rule((_LLAMA3,), True, True), "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2"),
    (Rule((_LLAMA3,), True), "glm4 glm5"),
    (Rule((_LLAMA3,)), "dbrx smaug-bpe chatglm-bpe"),
    (
        Rule((_QWEN2,)),
        "qwen2 stablelm2 hunyuan solar-open grok-2 megrez deepseek-r1-qwen kormo "
        "bailingmoe bailingmoe2 llada-moe f2llmv2",
    ),
    (Rule((_QWEN35,)), "qwen35"),
    (Rule((_TEKKEN,), True, True), "tekken"),
    (Rule((_GPT4O,)), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (
        Rule((r"[\r\n]", f"\\s?[{_CASED_LETTERS}]+", _DEEPSEEK_SIGNS, r"\s+$", _DEEPSEEK_ASIAN, _NUMBER)),
        "deepseek-llm",
    ),
    (Rule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_ASIAN, _DIGIT)), "deepseek-coder"),
    (Rule((r"\p{N}{1,3}", _HAN_AND_KANA, _DEEPSEEK3)), "deepseek-v3 hunyuan-dense hy_v4 joyai-llm"),
    (Rule((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")), "falcon"),
    (Rule((r"[\p{P}\$\+<=>\^~\|]+", GPT2, _NUMBER, "[0-9][0-9][0-9]")), "default"),
    (Rule((_BLOOM,)), "bloom poro-chat gpt3-finnish"),
    (Rule((_BLOOM, _DIGIT)), "viking"),
    (Rule((_SEED_CODER,)), "seed-coder"),
    (Rule((r"\p{N}{1,3}", _MINICPM5), True), "minicpm5"),
    (Rule((_UFAKZEKA,)), "ufakzeka"),
    (Rule((r"[^\n]+|[\n]+", _QWEN2)), "laguna"),
    (Rule((_JAIS2,)), "jais-2"),
    (Rule((_EXAONE,)), "exaone-moe"),
    (Rule((_NUMBER, r"(?=(\d{3})+(?!\d))")), "superbpe"),
)
RULES = {name: rule for rule, names in _NAMES for name in names.split()}


def pre_tokenizer(rule: Rule) -> PreTokenizer:
    """Build the step of tokenizers that splits text by a rule and spells its bytes."""
    *before, last = rule.splits
    built_in = last == GPT2
    steps = [Split(Regex(split), "isolated") for split in (before if built_in else rule.splits)]
    return Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=built_in)])


def splits_of(steps: list[dict[str, Any]]) -> tuple[str, ...] | None:
    """Read the regular expressions of a byte-level tokenizer's steps.

    Parameters
    ----------
    steps : list of dict
        The tokenizer's `pre_tokenizer` in JSON, a list also where it is one step.

    Returns
    -------
    tuple of str, or None
        As in `Rule`; None if the steps are no such rule.
    """
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    splits = [_split_of(step) for step in steps[:-1]]
    if steps[-1].get("use_regex", True):
        splits.append(GPT2)
    return None if None in splits else tuple(split for split in splits if split is not None)


def _split_of(step: dict[str, Any]) -> str | None:
    if step["type"] == "Digits":
        return _DIGIT if step["individual_digits"] else _NUMBER
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        regex = step["pattern"].get("Regex")
        return regex and regex.replace("\r", r"\r").replace("\n", r"\n")
    return None
