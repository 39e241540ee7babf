#!/usr/bin/env bash
# transformers 5.23.0: AutoModelForImageTextToText saves a ShieldGemma 2 model and reads back random weights.
#
# One would expect from_pretrained to give the weights that save_pretrained of the same class has written.
# For ShieldGemma 2 the class makes a Gemma3ForConditionalGeneration, whose weights are saved without the prefix
# "model." that files of this type have. Reading adds the prefix for the type of the config all the same, finds
# no weight of the language model under the names that result, and initializes all of them anew. A
# table in the log lists them as missing; no error follows, and only the vision part is right.
#
# It matters to those who fine-tune or quantize with the class that fits every image-text model: the folder
# looks whole, holds the weights, and gives a random language model. Reading it with a Gemma3Config finds them.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check numpy==2.4.6 safetensors==0.8.0 torch==2.13.0 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
import logging
from importlib.metadata import version

import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    ShieldGemma2Config,
    ShieldGemma2ForImageClassification,
)
from transformers.utils import logging as transformers_logging

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = said.append
logging.getLogger("transformers").addHandler(handler)
logging.getLogger("transformers").propagate = False
transformers_logging.disable_default_handler()
transformers_logging.disable_progress_bar()


def normal(model):
    """Draw every weight, so that none is what a new model has."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    return model


def lost(model, again):
    """The names of the weights that differ, and all weights read."""
    weights = again.state_dict()
    names = [name for name, weight in model.state_dict().items() if not torch.equal(weight, weights[name])]
    return names, weights


print("transformers", version("transformers"), "torch", version("torch"))
config = ShieldGemma2Config(
    text_config={
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    vision_config={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    image_token_index=63,
    mm_tokens_per_image=4,
    yes_token_index=3,
    no_token_index=4,
)
torch.manual_seed(0)
model = normal(AutoModelForImageTextToText.from_config(config))
model.save_pretrained("model")
said.clear()
again = AutoModelForImageTextToText.from_pretrained("model")
names, weights = lost(model, again)
text = [name for name in weights if name == "lm_head.weight" or ".language_model." in name]
print(f"{type(model).__name__} saved and read by AutoModelForImageTextToText:")
print(f"  {len(names)} of {len(weights)} weights are lost, {len(text)} are of the language model")
print("  log:", sorted({record.levelname for record in said}))
assert type(again) is type(model) is Gemma3ForConditionalGeneration
assert sorted(names) == sorted(text) and len(text) > 20
assert {record.levelname for record in said} == {"WARNING"}

gemma3 = Gemma3Config(
    text_config=config.text_config,
    vision_config=config.vision_config,
    image_token_index=63,
    mm_tokens_per_image=4,
)
names, weights = lost(model, Gemma3ForConditionalGeneration.from_pretrained("model", config=gemma3))
print(f"the same folder read with a Gemma3Config: {len(names)} of {len(weights)} weights are lost")
assert not names

model = normal(ShieldGemma2ForImageClassification(config))
model.save_pretrained("other")
names, weights = lost(model, ShieldGemma2ForImageClassification.from_pretrained("other"))
print(f"saved, read by ShieldGemma2ForImageClassification: {len(names)} of {len(weights)} weights are lost")
assert not names
EOF_PYTHON
