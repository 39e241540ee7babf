#!/usr/bin/env bash
# transformers 5.23.0: by default a mixture of experts cannot run in float64.
#
# One would expect a model in float64 to run, slowly: a dense one does. By default transformers computes the
# experts with torch's grouped_mm, which knows float32, bfloat16 and float16 only. transformers has a fallback of
# its own, but asks only whether torch has the function, not whether it takes the dtype: the model loads, and its
# first forward raises a RuntimeError about "mat_a" that names no setting. experts_implementation="eager" and
# "batched_mm" work.
#
# It matters to those who compare a conversion or a quantized model with the original in float64, to tell errors
# of rounding from errors of the code: the same lines work for all models but mixtures.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check numpy==2.4.6 safetensors==0.8.0 torch==2.13.0 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
from importlib.metadata import version

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()
print("transformers", version("transformers"), "torch", version("torch"))
size = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
ids = torch.arange(1, 13)[None]


def answer(model):
    """Logits, or what the model says instead."""
    try:
        with torch.no_grad():
            return model(input_ids=ids).logits
    except RuntimeError as problem:
        return str(problem)


LlamaForCausalLM(LlamaConfig(**size)).save_pretrained("dense")
dense = answer(LlamaForCausalLM.from_pretrained("dense", dtype=torch.float64))
print("LlamaForCausalLM, float64:", dense.dtype)
assert dense.dtype == torch.float64

for make, config in (
    (MixtralForCausalLM, MixtralConfig(**size, num_local_experts=4)),
    (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**size, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    ),
):
    torch.manual_seed(0)
    make(config).save_pretrained("model")
    single = answer(make.from_pretrained("model", dtype=torch.float32))
    for kind in (None, "batched_mm", "eager"):
        asked = {} if kind is None else {"experts_implementation": kind}
        double = answer(make.from_pretrained("model", dtype=torch.float64, **asked))
        print(f"{make.__name__}, float64, experts_implementation {kind}: ", end="")
        if kind is None:
            print(double)
            assert isinstance(double, str) and "Double" in double and "experts" not in double
        else:
            print(f"runs, {(double - single).abs().max():.1e} from float32")
            assert double.dtype == torch.float64 and torch.allclose(double, single.double(), atol=1e-4)
EOF_PYTHON
