"""GGUF files with tokenizers, and the ids that llama.cpp itself gives to texts with them.

``python -m tests.harness.models.llama_cpp`` writes `llama_cpp_ids.json`; it needs the package xllamacpp, in
which llama.cpp is. The vocabularies here join whatever a rule leaves together: no two rules give equal ids.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import TokenType
from tokenizers.pre_tokenizers import ByteLevel

from harness.models.gguf import embedded_gguf
from harness.models.word_splits import RULES

IDS = Path(__file__).with_name("llama_cpp_ids.json")

# Rules whose words include marks, such as vowels of Devanagari; llama.cpp's engine has no such class.
WITH_MARKS = ("tekken", "gpt-4o")
MARKED = "नमस्ते दुनिया १२।"

TEXTS = (
    "They're here, it's  1984 and 3.14!",
    "I'M he'Ll ''s don't o'so",
    "1 22 333 4444 55555 x1y22",
    "  12\n\n 3\t\t4",
    " two\n  three\r\n\r\n \tfour  \n",
    "\n\n\n   ",
    "if a[0]!=b and c_d: return {'k': -1e5}  # why?//\n",
    '$5 50% ^~`| <a href="/x"></a>.\n\n',
    "aBc HTTPServer naïve Élan Über Straße's",
    "Привет, Мир! Тест 2024",
    "你好，世界！テスト。한국어 123。",
    "مرحبا بالعالم ١٢٣، نعم؟",
    MARKED,
    "🙂👍🏽 e\u0301 ½²Ⅷ",
    "<s>a</s> b<|end▁of|> c <think>  d",
    "  <s>  two ",
)

LONGEST = 3  # characters of a token
CONTROL = ("<s>", "</s>", "<|end▁of|>")
WHOLE = ("<think>", "  d")
WIDTH = 32


def byte_level(path: Path, pre: str | None, more: Sequence[str] = (), **settings: Any) -> Path:
    """Byte-level BPE whose tokens are all short pieces of the texts, joined in any way.

    Two words are tokens that no merges lead to: only rules that ignore merges find them.
    """
    step = ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = _pieces([step.pre_tokenize_str(text)[0][0] for text in TEXTS])
    tokens = list(dict.fromkeys([*CONTROL, *WHOLE, *sorted(ByteLevel.alphabet()), *pieces, "They", "Ġtwo"]))
    tokens += more
    stated = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        "token_merges": [f"{piece[:at]} {piece[at:]}" for piece in pieces for at in range(1, len(piece))],
        "token_types": [_kind(token) for token in tokens],
    }
    return _write(path, tokens, {**stated, **settings})


def sentencepiece(path: Path, prefix: bool | None, **settings: Any) -> Path:
    """BPE over characters, with bytes for all beyond Latin, and scores instead of merges."""
    pieces = _pieces(["\u2581" + text.replace(" ", "\u2581") for text in TEXTS[:9]])
    tokens = list(dict.fromkeys(["<unk>", *CONTROL, *WHOLE, *(f"<0x{i:02X}>" for i in range(256)), *pieces]))
    stated = {
        "tokenizer_model": "llama",
        "add_space_prefix": prefix,
        "token_scores": [-float(i) for i in range(len(tokens))],
        "token_types": [_kind(token) for token in tokens],
    }
    return _write(path, tokens, {**stated, **settings})


def _pieces(texts: list[str]) -> dict[str, None]:
    pieces: dict[str, None] = {}
    for length in (*range(2, LONGEST + 1), 1):
        for text in texts:
            pieces |= dict.fromkeys(text[at : at + length] for at in range(len(text) - length + 1))
    return pieces


def _kind(token: str) -> TokenType:
    if token in CONTROL:
        return TokenType.CONTROL
    if token in WHOLE:
        return TokenType.USER_DEFINED
    if token == "<unk>":
        return TokenType.UNKNOWN
    return TokenType.BYTE if token.startswith("<0x") else TokenType.NORMAL


def _write(path: Path, tokens: list[str], settings: dict[str, Any]) -> Path:
    """A whole model, if a small one, as llama.cpp's server loads no other."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    first = tokens.index("<s>")
    for name, value in {"bos_token_id": first, "eos_token_id": first + 1, **settings}.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    for name in ("embedding_length", "feed_forward_length", "context_length"):
        getattr(writer, f"add_{name}")(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.{name}_norm": (WIDTH,) for name in ("attn", "ffn")}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}"] = (WIDTH, WIDTH)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ids_of_llama_cpp(path: Path) -> list[list[int]]:
    """The ids that llama.cpp's server gives to the texts, special tokens among them."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.warmup, settings.verbosity = WIDTH, False, 0
    server = xllamacpp.Server(settings)
    ids = []
    for text in TEXTS:
        query = {"content": text, "add_special": True, "parse_special": True}
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize",
            json.dumps(query).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            ids.append(json.load(answer)["tokens"])
    return ids


def main() -> None:
    """Write the ids of all rules, those with equal ids together."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        groups: dict[str, list[str]] = {}
        for name in RULES:
            groups.setdefault(json.dumps(ids_of_llama_cpp(byte_level(path, name))), []).append(name)
        unnamed = json.dumps(ids_of_llama_cpp(byte_level(path, None)))
        prefixes = [json.dumps(ids_of_llama_cpp(sentencepiece(path, prefix))) for prefix in (True, False)]
    embedded = json.dumps(ids_of_llama_cpp(embedded_gguf()))
    version = importlib.metadata.version("xllamacpp")
    lines = [f'    {{"names": {json.dumps(names)}, "ids": {ids}}}' for ids, names in groups.items()]
    IDS.write_text(
        f'{{\n  "written by": "python -m tests.harness.models.llama_cpp, xllamacpp {version}",\n'
        f'  "embedded": {embedded},\n  "unnamed": {unnamed},\n'
        f'  "prefix": {prefixes[0]},\n  "no prefix": {prefixes[1]},\n'
        '  "byte-level": [\n' + ",\n".join(lines) + "\n  ]\n}\n"
    )


if __name__ == "__main__":
    main()
