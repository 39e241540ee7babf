#!/usr/bin/env bash
# transformers 5.23.0: a LongCat Flash checkpoint must hold weights of experts that compute nothing.
#
# Some experts of LongCat Flash return their input as it is ("zero experts"), so one would expect a checkpoint to
# need no weights for them. transformers makes room for them in the matrices that read tokens, of which its
# forward pass never uses those rows, and none in the matrices that write. save_pretrained writes the unused
# matrices, and from_pretrained refuses a checkpoint without them: the experts' matrices have the wrong size.
#
# It matters to those whose files were written by code in which these experts are modules without parameters,
# and to those who count memory: by default 256 of 768 matrices of a layer are never read.
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
from safetensors.torch import load_file, save_file
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()
print("transformers", version("transformers"), "torch", version("torch"))
torch.manual_seed(0)
config = LongcatFlashConfig(
    vocab_size=64,
    hidden_size=64,
    ffn_hidden_size=64,
    expert_ffn_hidden_size=32,
    num_layers=1,
    num_attention_heads=2,
    n_routed_experts=4,
    zero_expert_num=2,
    moe_topk=3,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=16,
    head_dim=16,
)
model = LongcatFlashForCausalLM(config).eval()
experts = model.model.layers[0].mlp.experts
print("read:", tuple(experts.gate_up_proj.shape), "write:", tuple(experts.down_proj.shape))

ids = torch.arange(64)[None]
with torch.no_grad():
    before = model(ids).logits
    experts.gate_up_proj[4:] = torch.nan
    print("logits with NaN for the zero experts are the same:", torch.equal(model(ids).logits, before))
    assert torch.equal(model(ids).logits, before)
    experts.gate_up_proj[4:] = 0

model.save_pretrained("longcat")
tensors = load_file("longcat/model.safetensors")
unused = [name for name in tensors if any(f".experts.{number}." in name for number in (4, 5))]
print("written for the zero experts:", [name.split("experts.")[1] for name in unused])
assert len(unused) == 4
save_file({name: tensors[name] for name in tensors if name not in unused}, "longcat/model.safetensors", {"format": "pt"})
try:
    LongcatFlashForCausalLM.from_pretrained("longcat")
except RuntimeError as error:
    print("without them:", error)
else:
    raise SystemExit("a checkpoint without them is loaded: the behaviour has changed")
EOF_PYTHON
