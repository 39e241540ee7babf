#!/usr/bin/env bash
# transformers 5.23.0: calling a tokenizer changes the tokenizer.json that it saves afterwards.
#
# truncation=True and max_length are arguments of one call, so one would expect them to end with it.
# The call stores them in the Rust tokenizer, and save_pretrained writes them into tokenizer.json.
# transformers clears them in its next call and never shows it. A program that reads tokenizer.json with
# the tokenizers library cuts every text to the length of that call, without a word. Padding is stored too.
#
# It matters to those who calibrate, fine-tune or quantize and then save the tokenizer beside the model:
# the length of a calibration text becomes the longest prompt of a server. Saving before the
# first call avoids it, and so does tokenizer.backend_tokenizer.no_truncation().
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

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

print("transformers", version("transformers"), "tokenizers", version("tokenizers"))
backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")

text = "a b a b a b a b"
lengths = {}
for when in ("before", "after"):
    if when == "after":
        tokenizer(text, truncation=True, max_length=3)
    tokenizer.save_pretrained(when)
    file = Path(when) / "tokenizer.json"
    stored = json.loads(file.read_text())["truncation"]
    with_transformers = AutoTokenizer.from_pretrained(when)(text).input_ids
    with_tokenizers = Tokenizer.from_file(str(file)).encode(text).ids
    lengths[when] = len(with_transformers), len(with_tokenizers)
    print(f"saved {when} a call: truncation {stored}")
    print(f"  a text of 8 tokens read back: {lengths[when][0]} by transformers, {lengths[when][1]} by tokenizers")
tokenizer.backend_tokenizer.no_truncation()
tokenizer.save_pretrained("cleared")
assert json.loads(Path("cleared/tokenizer.json").read_text())["truncation"] is None
assert lengths == {"before": (8, 8), "after": (8, 3)}
EOF_PYTHON
