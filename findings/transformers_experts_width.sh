#!/usr/bin/env bash
# transformers 5.23.0: a mixture whose experts are 100 wide runs in float32, but not in bfloat16.
#
# A width that works in one dtype works in another, one would expect, and so it does for a dense model. By
# default transformers computes experts with torch's grouped_mm, which wants rows whose length is a multiple
# of 16 bytes: 4 columns of float32, but 8 of bfloat16 or float16. The fallback that transformers has asks
# where the weights begin, for old versions of torch, and not how long a row is. So the model loads, and its
# first forward raises "strides should be multiple of 16 bytes", without the name of a setting. Widths of 98
# fail in float32, too. experts_implementation="eager" and "batched_mm" work.
#
# It matters to those who prune experts, or cut them for several devices: the pruned model is right in
# float32, where it was checked, and fails in the dtype that it is saved and served in.
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
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
print("transformers", version("transformers"), "torch", version("torch"))
size = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
ids = torch.arange(1, 13)[None]


def dense(width):
    return LlamaForCausalLM(LlamaConfig(**size, intermediate_size=width))


def mixtral(width):
    return MixtralForCausalLM(MixtralConfig(**size, intermediate_size=width, num_local_experts=4))


def qwen(width):
    rest = {"intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**size, **rest, moe_intermediate_size=width))


def answer(make, width, dtype, **asked):
    """Logits, or what the model says instead."""
    torch.manual_seed(0)
    made = make(width)
    made.save_pretrained("model")
    try:
        with torch.no_grad():
            return type(made).from_pretrained("model", dtype=dtype, **asked)(input_ids=ids).logits.float()
    except RuntimeError as problem:
        return str(problem)


for make in (dense, mixtral, qwen):
    for width, fails in (
        (96, ()),
        (100, (torch.bfloat16, torch.float16)),
        (98, (torch.bfloat16, torch.float16, torch.float32)),
    ):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = answer(make, width, dtype)
            print(f"{make.__name__}, width {width}, {dtype}:", found if isinstance(found, str) else "runs")
            if make is dense or dtype not in fails:
                assert torch.isfinite(found).all()
            else:
                assert "strides" in found and "experts" not in found
    if make is not dense:
        exact = answer(make, 100, torch.float32)
        for kind in ("eager", "batched_mm"):
            found = answer(make, 100, torch.bfloat16, experts_implementation=kind)
            away = (found - exact).abs().max()
            print(f"{make.__name__}, width 100, torch.bfloat16, {kind}: {away:.1e} from float32")
            assert torch.allclose(found, exact, atol=0.05)
EOF_PYTHON
