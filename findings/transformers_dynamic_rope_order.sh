#!/usr/bin/env bash
# transformers 5.23.0: with dynamic rotary scaling, the logits of a text depend on the texts before it.
#
# rope_type "dynamic" stretches the rotary embedding by the length of the text, once it is longer than the
# model was made for. A forward pass without a cache reads nothing but its text, so one would expect the same
# logits each time. The module remembers the longest length that it has seen and keeps the frequencies of that
# one for every shorter text, until a text within the original length resets it. So 100 tokens after a text of
# 300 give other logits than before, and after one of 40 the first ones again. A longer text beside it in a
# batch does the same.
#
# It matters to those who measure perplexity or calibrate beyond the original length: the result depends on
# the order of the texts and on the size of batches, and a resumed run differs from one in one piece. Texts of
# one length, or a call with a short text before each one, avoid it.
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
from transformers import LlamaConfig, LlamaForCausalLM

print("transformers", version("transformers"), "torch", version("torch"))
text = torch.randint(0, 90, (300,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def changes(rope):
    """How far the logits of 100 tokens are from those of a new model, after other calls of it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters=rope,
    )
    model = LlamaForCausalLM(config).eval()
    first = model(text[None, :100], use_cache=False).logits[0]
    found = {}
    for length in (100, 300, 40):
        model(text[None, :length], use_cache=False)
        after = model(text[None, :100], use_cache=False).logits[0]
        found[f"after a text of {length}"] = float((after - first).abs().max())
    batch = torch.zeros(2, 300, dtype=torch.int64)
    batch[0, :100], batch[1] = text[:100], text
    mask = torch.tensor([[1] * 100 + [0] * 200, [1] * 300])
    beside = model(batch, attention_mask=mask, use_cache=False).logits[0, :100]
    found["beside a text of 300"] = float((beside - first).abs().max())
    return found


plain = changes({"rope_type": "default", "rope_theta": 1e4})
dynamic = changes({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
print("default:", plain)
print("dynamic:", dynamic)
assert max(plain.values()) < 1e-5
assert dynamic["after a text of 100"] == dynamic["after a text of 40"] == 0
assert dynamic["after a text of 300"] > 1e-3 and dynamic["beside a text of 300"] > 1e-3
EOF_PYTHON
