#!/usr/bin/env bash
# transformers 5.23.0 reads a llama GGUF file without the scaling of its rotary embedding.
#
# Llama 3.1 and later stretch the low frequencies of the rotary embedding; a GGUF file holds the divisors
# in the tensor rope_freqs.weight. Linear and YaRN scaling are in the keys llama.rope.scaling.*. One would
# expect from_pretrained with gguf_file to apply them, as runtimes of GGUF do, or to refuse the file.
# It drops both: the config says "default", the frequencies are the plain ones, and there is no warning.
#
# It matters to those who measure or fine-tune a GGUF model in transformers: every tensor of weights is
# right, but it is another model, and the longer the text the more so. Setting config.rope_parameters
# from the original config avoids it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1 TQDM_DISABLE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check accelerate==1.15.0 gguf==0.19.0 numpy==2.4.6 torch==2.13.0 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
import logging
from importlib.metadata import version

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = said.append
logging.getLogger("transformers").addHandler(handler)
transformers_logging.disable_progress_bar()

WIDTH, HEADS, VOCAB, THETA = 128, 2, 32, 500000.0
llama3 = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def frequencies(rope):
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        max_position_embeddings=131072,
        rope_parameters=rope,
    )
    return LlamaForCausalLM(config).model.rotary_emb.inv_freq


plain, scaled = frequencies({"rope_type": "default", "rope_theta": THETA}), frequencies(llama3)


def write(path, divisors=None, scaling=None):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(131072)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(THETA)
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(8.0)
        writer.add_rope_scaling_orig_ctx_len(8192)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([str(i) for i in range(VOCAB)])
    random = np.random.default_rng(0)
    for name in ("token_embd", "output", "blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        shape = WIDTH if "norm" in name else (VOCAB, WIDTH)
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", 0.1 * random.standard_normal((WIDTH, WIDTH)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


print("transformers", version("transformers"), "gguf", version("gguf"))
write("plain.gguf")
write("llama3.gguf", divisors=(plain / scaled).numpy())
write("linear.gguf", scaling=gguf.RopeScalingType.LINEAR)
write("yarn.gguf", scaling=gguf.RopeScalingType.YARN)
ids = torch.arange(256)[None] % VOCAB
logits = {}
for name in ("plain", "llama3", "linear", "yarn"):
    model = AutoModelForCausalLM.from_pretrained(".", gguf_file=f"{name}.gguf")
    rotary = model.model.rotary_emb
    with torch.no_grad():
        logits[name] = model(ids).logits
    print(f"{name}.gguf: {model.config.rope_parameters['rope_type']}, lowest frequency {rotary.inv_freq[-1]:.3g}")
    assert torch.equal(rotary.inv_freq, plain)
    assert torch.equal(logits[name], logits["plain"])
print(f"lowest frequency of Llama 3.1's scaling: {scaled[-1]:.3g}, warnings: {len(said)}")
assert not torch.allclose(scaled, plain, rtol=0.1, atol=0) and not said

# The same weights with the scaling that the file states are another model.
model.config.rope_parameters = llama3
model.model.rotary_emb = type(rotary)(model.config)
with torch.no_grad():
    change = (model(ids).logits - logits["plain"]).abs().max()
print(f"with that scaling some logit of a text of {ids.shape[1]} tokens changes by {change:.2g}")
assert change > 1e-3
EOF_PYTHON
