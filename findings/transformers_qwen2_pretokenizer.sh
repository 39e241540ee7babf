#!/usr/bin/env bash
# transformers 5.23.0: beside a config of Qwen2, AutoTokenizer splits text its own way, not the file's.
#
# tokenizer.json states how text is split before merging, and tokenizer_config.json names the plain class
# that uses the file as it is. One would expect AutoTokenizer to do so. If config.json says
# "model_type": "qwen2", it builds a Qwen2Tokenizer instead, of which only vocabulary and merges come from
# the file: normalizer, split and decoder are Qwen2's. "qwen3" beside the same two files keeps the
# file's own. Nothing is said, and save_pretrained writes the other split into tokenizer.json.
#
# It matters to those who train a Qwen2 architecture on a vocabulary of their own, or exchange its
# tokenizer: ids are not those of the training, and programs that read tokenizer.json disagree. The same
# goes for other types in a list in transformers. PreTrainedTokenizerFast.from_pretrained avoids it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1 TRANSFORMERS_NO_ADVISORY_WARNINGS=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check tokenizers==0.23.3 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
import json
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

print("transformers", version("transformers"), "tokenizers", version("tokenizers"))
tokens = ["<|endoftext|>", "2", "0", "6", "20", "26", "2026", "a", "Ġ", "Ċ"]
backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("2", "0"), ("2", "6"), ("20", "26")]))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
saved = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")

text = "a 2026\n"
right = backend.encode(text).ids
kept = {}
for config in (Qwen2Config(), Qwen3Config()):
    folder = Path(config.model_type)
    config.save_pretrained(folder)
    saved.save_pretrained(folder)
    named = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    from_file = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    plain = PreTrainedTokenizerFast.from_pretrained(folder)(text).input_ids
    auto = AutoTokenizer.from_pretrained(folder)
    ids = auto(text).input_ids
    auto.save_pretrained(folder / "again")
    again = Tokenizer.from_file(str(folder / "again/tokenizer.json")).encode(text).ids
    print(f"{folder}: tokenizer_class {named}, AutoTokenizer gives {type(auto).__name__}")
    print(f"  tokenizer.json {from_file}, AutoTokenizer {ids}, tokenizer.json saved again {again}")
    assert from_file == plain == right
    assert ids == again
    kept[config.model_type] = ids == right
assert kept == {"qwen2": False, "qwen3": True}
EOF_PYTHON
