#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer reads a tokenizer from a folder that holds none.
#
# A folder with only the config of a model, as model.save_pretrained leaves it, has no vocabulary. One
# would expect an error, and for llama and mistral there is one. For qwen2, gpt_neox, gpt2, opt, cohere and
# gemma from_pretrained returns a tokenizer of special tokens alone, without a warning. Most of these turn
# every text into no ids at all, and gemma's turns every text into one unknown token.
#
# It matters to everyone who forgets to copy the tokenizer beside a fine-tuned or quantized model: the
# folder loads, and the prompt or the calibration text is empty. len(tokenizer) against the
# vocab_size of the config shows it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1 TRANSFORMERS_NO_ADVISORY_WARNINGS=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check tokenizers==0.23.3 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
import logging
from importlib.metadata import version

from transformers import AutoConfig, AutoTokenizer

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = said.append
logging.getLogger("transformers").addHandler(handler)

print("transformers", version("transformers"))
text = "The quick brown fox"
ids = {}
for kind in ("qwen2", "gpt_neox", "gpt2", "opt", "cohere", "gemma", "llama", "mistral"):
    config = AutoConfig.for_model(kind)
    config.save_pretrained(kind)
    try:
        tokenizer = AutoTokenizer.from_pretrained(kind)
    except ValueError as error:
        ids[kind] = type(error).__name__
        print(f"{kind}: {ids[kind]}")
        continue
    ids[kind] = tokenizer(text).input_ids
    size = f"{len(tokenizer)} of {config.vocab_size} tokens"
    print(f"{kind}: {type(tokenizer).__name__}, {size}, {text!r} is {ids[kind]}")
assert all(ids[kind] == [] for kind in ("qwen2", "gpt_neox", "gpt2", "opt", "cohere"))
assert len(ids["gemma"]) == 1
assert ids["llama"] == ids["mistral"] == "ValueError"
assert not said
EOF_PYTHON
