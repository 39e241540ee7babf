#!/usr/bin/env bash
# transformers 5.23.0: a model saved in shards over one in a single file is read back as the old model.
#
# save_pretrained into a folder that holds a model already replaces it: a single file over shards removes
# the shards. One would expect the same the other way round. But shards over a single file leave
# model.safetensors where it is, beside the new shards and their index, and from_pretrained prefers it.
# It gives the old weights and says nothing. A reader that follows the index gets the new ones.
#
# It matters to those who fine-tune or quantize and save to the same folder: a smaller max_shard_size, or a
# model that grew past the default one, undoes the work, and two programs see two models in one folder.
# Saving to a new folder avoids it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check numpy==2.4.6 safetensors==0.8.0 torch==2.13.0 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
import json
import logging
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = said.append
logging.getLogger("transformers").addHandler(handler)
transformers_logging.disable_progress_bar()


def show(folder):
    print(" ", *sorted(path.name for path in Path(folder).glob("model*")))


print("transformers", version("transformers"), "safetensors", version("safetensors"))
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
model = LlamaForCausalLM(config)
weight = model.lm_head.weight
with torch.no_grad():
    weight.zero_()
    model.save_pretrained("model")
    weight.fill_(1)
    model.save_pretrained("model", max_shard_size="20KB")
print("shards saved over a single file:")
show("model")
again = LlamaForCausalLM.from_pretrained("model").lm_head.weight
shard = json.loads(Path("model/model.safetensors.index.json").read_text())["weight_map"]["lm_head.weight"]
with safe_open(Path("model") / shard, "pt") as file:
    by_index = file.get_tensor("lm_head.weight")
print(f"  saved last: all 1, from_pretrained: {again.unique().tolist()}, by the index: {by_index.unique().tolist()}")
print(f"  warnings: {len(said)}")
assert torch.all(again == 0) and torch.all(by_index == 1) and not said

with torch.no_grad():
    model.save_pretrained("other", max_shard_size="20KB")
    weight.fill_(2)
    model.save_pretrained("other")
print("a single file saved over shards:")
show("other")
assert not list(Path("other").glob("model-*"))
assert torch.all(LlamaForCausalLM.from_pretrained("other").lm_head.weight == 2)
EOF_PYTHON
