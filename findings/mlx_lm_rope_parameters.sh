#!/usr/bin/env bash
# mlx_lm 0.32.2 reads a Llama saved by transformers 5 with another rope base, and says nothing.
#
# transformers 5 saves the rope base as rope_parameters.rope_theta. One would expect mlx_lm, which requires
# transformers 5 or later, to read it there or to refuse. Its Qwen3 does read it. But its Llama knows only the
# old key at the top of config.json and takes 10000 when that is absent; Qwen2 and Mixtral take 1000000. Any other base
# is lost: the model loads without a word, and its logits are those of another model. The Qwen3-MoE of mlx_lm has
# no default and refuses a whole folder: it misses rope_theta, and num_experts, which transformers 5
# saves as num_local_experts.
#
# It matters to those who fine-tune or quantize with transformers and run the result with mlx_lm: Llama 3
# has base 500000. Writing rope_theta into config.json, beside rope_parameters, gives the right logits.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check "mlx[cpu]==0.32.2" mlx-lm==0.32.2 numpy==2.4.6 safetensors==0.8.0 torch==2.13.0 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
import json
import warnings
from importlib.metadata import requires, version
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()
warnings.simplefilter("error")
mx.set_default_device(mx.cpu)
print("mlx_lm", version("mlx-lm"), "transformers", version("transformers"))
print("  requires:", *(line for line in requires("mlx-lm") if line.startswith("transformers")))
tokens = np.arange(1, 61)[None]


def save(make, config, theta):
    torch.manual_seed(0)
    config = config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        **({"num_local_experts": 4} if config is MixtralConfig else {}),
        **({"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16} if config is Qwen3MoeConfig else {}),
    )
    model = make(config).eval()
    model.save_pretrained("model")
    return model


def error(model):
    """The largest difference of logits, as a part of the largest logit."""
    with torch.no_grad():
        right = model(torch.tensor(tokens)).logits.numpy()
    loaded, _ = load_model(Path("model"))
    return float(abs(np.array(loaded(mx.array(tokens))) - right).max() / abs(right).max())


found = {}
for make, config in (
    (LlamaForCausalLM, LlamaConfig),
    (Qwen2ForCausalLM, Qwen2Config),
    (MixtralForCausalLM, MixtralConfig),
    (Qwen3ForCausalLM, Qwen3Config),
):
    for theta in (1e4, 5e5, 1e6):
        found[config, theta] = error(save(make, config, theta))
        print(f"{make.__name__}, rope_theta {theta:.0f}: logits differ by {found[config, theta]:.1e}")
wrong = {case for case, value in found.items() if value > 0.1}
assert all(value < 1e-4 for case, value in found.items() if case not in wrong)
assert wrong == {
    (LlamaConfig, 5e5),
    (LlamaConfig, 1e6),
    (Qwen2Config, 1e4),
    (Qwen2Config, 5e5),
    (MixtralConfig, 1e4),
    (MixtralConfig, 5e5),
}

model = save(LlamaForCausalLM, LlamaConfig, 5e5)
path = Path("model/config.json")
path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 5e5}))
mended = error(model)
print(f"LlamaForCausalLM, rope_theta 500000, also at the top of config.json: logits differ by {mended:.1e}")
assert mended < 1e-4

save(Qwen3MoeForCausalLM, Qwen3MoeConfig, 1e6)
try:
    load_model(Path("model"))
    refused = ""
except TypeError as problem:
    refused = str(problem)
print("Qwen3MoeForCausalLM:", refused)
assert "num_experts" in refused and "rope_theta" in refused
EOF_PYTHON
