#!/usr/bin/env bash
# transformers 5.23.0: calling a CTRL model in half precision changes the model.
#
# A forward pass in eval mode computes logits, and one would expect it to leave the model as it was. A CTRL
# model loaded in bfloat16 keeps its table of positions in float32. Its first call rounds that table
# to bfloat16 and puts it in place of the exact one. A second call does not show it, as the first
# one used the rounded table already. But made float32 afterwards, the model gives other logits than a model
# that was made float32 before its first call, with the same weights to the last bit.
#
# It matters to those who compare a half-precision model with its float32 self, calibrate in one dtype
# and evaluate in another, or check that buffers are unchanged: the order of the calls decides
# the result. Loading the model again in the wanted dtype avoids it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
from importlib.metadata import version

import torch
from transformers import CTRLConfig, CTRLLMHeadModel
from transformers.utils import logging

logging.disable_progress_bar()
print("transformers", version("transformers"), "torch", version("torch"))
torch.manual_seed(0)
config = CTRLConfig(vocab_size=64, n_positions=256, n_embd=64, dff=64, n_layer=2, n_head=2)
CTRLLMHeadModel(config).to(torch.bfloat16).save_pretrained("ctrl")
ids = torch.arange(64)[None]

logits = {}
with torch.no_grad():
    for called in (False, True):
        model = CTRLLMHeadModel.from_pretrained("ctrl", dtype=torch.bfloat16).eval()
        before = model.transformer.pos_encoding
        if called:
            model(ids)
        after = model.transformer.pos_encoding
        changed = float((before - after.float()).abs().max())
        logits[called] = model.float()(ids).logits
        print(f"called in bfloat16: {called}, positions in {before.dtype} now {after.dtype}, changed by {changed:.2g}")
        assert before.dtype == torch.float32
        assert (after.dtype == torch.bfloat16 and changed > 1e-4) if called else changed == 0
    direct = CTRLLMHeadModel.from_pretrained("ctrl", dtype=torch.float32).eval()(ids).logits
difference = {called: float((each - direct).abs().max()) for called, each in logits.items()}
print(f"logits in float32 differ from those of a model loaded in float32: {difference}")
assert difference[False] == 0 and difference[True] > 0
EOF_PYTHON
