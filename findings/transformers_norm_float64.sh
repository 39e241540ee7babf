#!/usr/bin/env bash
# transformers 5.23.0: a Llama in float64 is about as exact as one in float32, though its logits are float64.
#
# One would expect a model in float64 to compute 16 digits, as torch.nn.RMSNorm does. The RMSNorm of
# transformers casts its input to float32, so that half-precision models are exact enough, and casts the
# result back. For float64 that cast is a rounding to 7 digits, twice a layer, with nothing in the dtype of
# the result to show it. Llama, Qwen, Mistral, Gemma, Phi-3, OLMo 2, GPT-OSS, DeepSeek and T5 all have it.
# Replacing the norms by torch's, with the same weights, gives the exact logits to compare with.
#
# It matters to those who take a float64 run as the truth, to tell errors of rounding from errors of the code,
# or to judge a kernel: the difference cannot be told from the rounding of what it is compared with.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check numpy==2.4.6 torch==2.13.0 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
from importlib import import_module
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM

print("transformers", version("transformers"), "torch", version("torch"))
torch.manual_seed(0)
inputs = torch.randn(8, 64, dtype=torch.float64)
exact = inputs / torch.sqrt(inputs.square().mean(-1, keepdim=True) + 1e-6)


def error(norm):
    outputs = norm.double()(inputs)
    assert outputs.dtype == torch.float64
    return float((outputs - exact).abs().max())


here = error(torch.nn.RMSNorm(64, eps=1e-6))
print(f"error of a norm in float64: torch.nn.RMSNorm {here:.0e}")
assert here < 1e-14
for family, name in (
    ("llama", "LlamaRMSNorm"),
    ("qwen3", "Qwen3RMSNorm"),
    ("mistral", "MistralRMSNorm"),
    ("gemma2", "Gemma2RMSNorm"),
    ("phi3", "Phi3RMSNorm"),
    ("olmo2", "Olmo2RMSNorm"),
    ("gpt_oss", "GptOssRMSNorm"),
    ("deepseek_v3", "DeepseekV3RMSNorm"),
    ("t5", "T5LayerNorm"),
):
    kind = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)
    here = error(kind(64, eps=1e-6))
    print(f"  {name} {here:.0e}")
    assert 1e-8 < here < 1e-6

config = LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(0, 96, (1, 64))
with torch.no_grad():
    single = model(ids).logits
    double = model.double()(ids).logits
    norms = {name: part for name, part in model.named_modules() if type(part).__name__ == "LlamaRMSNorm"}
    for name, norm in norms.items():
        replacement = torch.nn.RMSNorm(64, eps=norm.variance_epsilon, dtype=torch.float64)
        replacement.weight.copy_(norm.weight)
        model.set_submodule(name, replacement)
    truth = model(ids).logits
assert double.dtype == truth.dtype == torch.float64
errors = [float((logits - truth).norm() / truth.norm()) for logits in (single, double)]
print(f"relative error of the logits of a Llama: in float32 {errors[0]:.0e}, in float64 {errors[1]:.0e}")
assert 1e-8 < errors[1] < errors[0] < 20 * errors[1]
EOF_PYTHON
