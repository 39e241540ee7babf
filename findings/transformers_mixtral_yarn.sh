#!/usr/bin/env bash
# transformers 5.23.0: a Mixtral with YaRN cannot be made unless its config states head_dim.
#
# Mixtral's head_dim is None by default, and its attention then takes hidden_size / num_attention_heads, as
# Mixtral-8x7B, whose config.json has no head_dim, needs. One would expect the rotary embedding to do the
# same. For the kinds "default", "linear" and "llama3" it does. For "yarn" and "dynamic" the quotient is taken
# only if the config has no attribute head_dim, and here it has one that is None. So the model raises a
# TypeError about NoneType and float that names no setting. Llama and Mistral fill in head_dim themselves and
# have no such fault.
#
# It matters to those who give a Mixtral a longer context before they calibrate or measure it: the same lines
# that stretch a Mistral fail. Stating head_dim in the config avoids it and changes nothing else.
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

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.utils import logging

logging.set_verbosity_error()
print("transformers", version("transformers"), "torch", version("torch"))
size = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
ropes = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
ids = torch.arange(12)[None]


def answer(make, config):
    """Logits, or what the model says instead."""
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            return make(config).eval()(ids).logits
    except TypeError as problem:
        return str(problem)


for make, configure in (
    (LlamaForCausalLM, LlamaConfig),
    (MistralForCausalLM, MistralConfig),
    (MixtralForCausalLM, MixtralConfig),
):
    for kind, rest in ropes.items():
        rope = {"rope_type": kind, "rope_theta": 10000.0, **rest}
        absent = answer(make, configure(**size, rope_parameters=dict(rope)))
        stated = answer(make, configure(**size, rope_parameters=dict(rope), head_dim=16))
        print(f"{make.__name__}, {kind}:", absent if isinstance(absent, str) else "runs")
        if make is MixtralForCausalLM and kind in ("dynamic", "yarn"):
            assert isinstance(absent, str) and "NoneType" in absent and "head_dim" not in absent
        else:
            assert torch.equal(absent, stated)
        assert torch.isfinite(stated).all()
EOF_PYTHON
