#!/usr/bin/env bash
# gguf 0.19.0 finds no chat template in a tokenizer that transformers 5.23.0 saved with one.
#
# A tokenizer may have several named chat templates, and none of them needs to be called "default".
# transformers saves those in additional_chat_templates/ and reads them back. One would expect
# gguf.SpecialVocab, which knows that folder, to read them too. It looks there only if a file
# chat_template.jinja lies beside it, and transformers writes that file only for "default".
# There is no warning: chat_template is None.
#
# It matters to those who convert models for chat or for tools: the GGUF file has no template, and
# a runtime has to guess the format of a conversation.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1 TRANSFORMERS_NO_ADVISORY_WARNINGS=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check gguf==0.19.0 numpy==2.4.6 tokenizers==0.23.3 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
from importlib.metadata import version
from pathlib import Path

from gguf import SpecialVocab
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

print("gguf", version("gguf"), "transformers", version("transformers"))
backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
read = {}
for names in (["tool_use"], ["default", "tool_use"]):
    folder = Path("-".join(names))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.chat_template = {name: f"{name}: {{{{ messages }}}}" for name in names}
    tokenizer.save_pretrained(folder)

    print("saved:", sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jinja")))
    again = AutoTokenizer.from_pretrained(folder).chat_template
    template = SpecialVocab(folder).chat_template
    read[folder.name] = template
    print("  transformers reads", sorted(again), "\n  gguf reads", template and [each["name"] for each in template])
    assert again == tokenizer.chat_template
assert read["tool_use"] is None
assert [each["name"] for each in read["default-tool_use"]] == ["default", "tool_use"]
EOF_PYTHON
