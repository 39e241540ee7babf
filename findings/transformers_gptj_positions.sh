#!/usr/bin/env bash
# transformers 5.23.0: a GPT-J or CodeGen made in bfloat16 is another model once it is saved and loaded.
#
# from_config(config, dtype=torch.bfloat16) and from_pretrained of what it saved have the same weights, and
# the sines and cosines of positions follow from the config alone. Both keep that table in float32. One
# would expect the same logits. But from_config computes the frequencies in the default dtype of that
# moment, bfloat16, before it goes on in float32, and the rounding of a frequency is multiplied by the
# position. from_pretrained computes all of it in float32. The table is not stored.
#
# It matters to those who train such a model from its config, or test a loader against it: the model
# that was trained cannot be had back from its checkpoint. Saving and loading it before training
# avoids it. Making it in float32 and calling .to(torch.bfloat16) does not, as that rounds the table.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check numpy==2.4.6 torch==2.13.0 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
from importlib.metadata import version

import numpy as np
import torch
from transformers import AutoModelForCausalLM, CodeGenConfig, GPTJConfig, GPTNeoXConfig
from transformers.utils import logging

logging.disable_progress_bar()
LENGTH, ROTATED = 2048, 16
print("transformers", version("transformers"), "torch", version("torch"))
special = {"bos_token_id": 0, "eos_token_id": 0}
small = {"vocab_size": 64, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": ROTATED}
neox = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
neox |= {"num_hidden_layers": 2, "num_attention_heads": 4}

# In float64: the sines of all frequencies, then the cosines.
angles = np.arange(LENGTH)[:, np.newaxis] / 10000.0 ** (np.arange(0, ROTATED, 2) / ROTATED)
exact = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

same = {}
for config in (GPTJConfig(**small, **special), CodeGenConfig(**small, **special), GPTNeoXConfig(**neox, **special)):
    kind = config.model_type
    config.initializer_range = 0.2
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    made.save_pretrained(kind)
    read = AutoModelForCausalLM.from_pretrained(kind, dtype=torch.bfloat16).eval()
    weights = zip(made.state_dict().values(), read.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype == torch.bfloat16 for a, b in weights)

    ids = torch.randint(64, (1, LENGTH))
    with torch.no_grad():
        logits = [model(ids).logits.float() for model in (made, read)]
    same[kind] = torch.equal(*logits)
    change = (logits[0] - logits[1]).norm() / logits[1].norm()
    print(f"{kind}: same weights, same logits: {same[kind]}, relative difference {change:.2g}")
    if kind != "gpt_neox":
        tables = [model.transformer.h[0].attn.embed_positions for model in (made, read)]
        errors = [float(np.abs(table.numpy() - exact).max()) for table in tables]
        print(f"  error of the {tables[0].dtype} table: {errors[0]:.2g} as made, {errors[1]:.2g} as read")
        assert all(table.dtype == torch.float32 for table in tables)
        assert errors[0] > 0.1 and errors[1] < 1e-3
assert same == {"gptj": False, "codegen": False, "gpt_neox": True}
EOF_PYTHON
