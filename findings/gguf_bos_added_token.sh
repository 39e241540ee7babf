#!/usr/bin/env bash
# gguf 0.19.0: the spelling of bos_token decides whether a GGUF file asks for BOS.
#
# tokenizer_config.json names a special token as a string or as an AddedToken object, the form found
# in files of transformers 4.33. Both mean the same token, so one would expect the same GGUF metadata.
# transformers reads both alike. gguf.SpecialVocab does not: to find out whether the template in
# tokenizer.json adds BOS, it compares the name there with the raw config entry, and a string never
# equals an object. The token id is right, add_bos_token is false, and a log line calls <s> unknown.
#
# It matters to everyone who converts a tokenizer: the GGUF file asks for no first token, and a loss
# of quality from that looks like poor quantization. A config with an explicit add_bos_token is safe.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1 TRANSFORMERS_NO_ADVISORY_WARNINGS=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check gguf==0.19.0 numpy==2.4.6 tokenizers==0.23.3 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
import json
from importlib.metadata import version
from pathlib import Path

from gguf import SpecialVocab
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.add_special_tokens(["<s>"])
tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
)

as_object = {
    "__type": "AddedToken",
    "content": "<s>",
    "lstrip": False,
    "normalized": True,
    "rstrip": False,
    "single_word": False,
}
print("gguf", version("gguf"))
seen = {}
for spelling, entry in (("string", "<s>"), ("AddedToken", as_object)):
    folder = Path(spelling)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": entry}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

    ids = AutoTokenizer.from_pretrained(folder)("a b").input_ids
    vocab = SpecialVocab(folder)
    seen[spelling] = vocab.add_special_token["bos"]
    print(f"bos_token as {spelling}: transformers gives {ids}")
    print(f"  gguf reads id {vocab.special_token_ids['bos']}, add_bos_token {seen[spelling]}")
    assert ids == [1, 2, 3]
    assert vocab.special_token_ids == {"bos": 1}
assert seen == {"string": True, "AddedToken": False}
EOF_PYTHON
