#!/usr/bin/env bash
# transformers 5.23.0: saving a config makes the same config load other weights.
#
# config.json may name the file of weights, "transformers_weights": "tuned.safetensors", and from_pretrained
# reads that one. save_pretrained of a config writes a copy to another folder, so one would expect the object
# in memory to stay as it is. It deletes the name from the object, not only from the copy. The next
# from_pretrained with that config takes model.safetensors, if there is one, and says nothing.
#
# It matters to those who keep two sets of weights in one folder: a script that saves the config beside its
# results and loads the model again has the tuned one before and the original one after, by the same line
# and with the same config. Saving copy.deepcopy(config) avoids it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check numpy==2.4.6 safetensors==0.8.0 torch==2.13.0 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
import copy
import json
import logging
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = said.append
logging.getLogger("transformers").addHandler(handler)
transformers_logging.disable_progress_bar()

# model.safetensors has zeros in lm_head and tuned.safetensors ones; config.json names the second file.
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
)
torch.nn.init.zeros_(model.lm_head.weight)
model.save_pretrained("model")
tensors = load_file("model/model.safetensors")
tensors["lm_head.weight"] = torch.ones_like(tensors["lm_head.weight"])
save_file(tensors, "model/tuned.safetensors", metadata={"format": "pt"})
file = Path("model/config.json")
file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_weights": "tuned.safetensors"}))


def show(when):
    named = getattr(config, "transformers_weights", None)
    values = AutoModelForCausalLM.from_pretrained("model", config=config).lm_head.weight.unique().tolist()
    print(f"{when}: transformers_weights {named}, lm_head all {values}")
    return values


print("transformers", version("transformers"), "safetensors", version("safetensors"))
config = AutoConfig.from_pretrained("model")
assert show("read from config.json") == [1]
copy.deepcopy(config).save_pretrained("first")
assert show("after saving a copy of it") == [1]
config.save_pretrained("second")
assert show("after saving it") == [0]
print(f"warnings: {len(said)}")
assert not said
EOF_PYTHON
