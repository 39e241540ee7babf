#!/usr/bin/env bash
# transformers 5.23.0 reads a starcoder2 or stablelm GGUF file with a rotary base of 10000, always.
#
# The key ARCHITECTURE.rope.freq_base is the base of the rotary embedding, and a converter writes rope_theta of
# the original config there. from_pretrained with gguf_file reads it for llama, qwen2, falcon and others, so
# one would expect it for every architecture that it supports and that has this key. For starcoder2 and stablelm
# the key is missing in its table. The base is the default of the config, and two files that differ only in
# this key are one model. Above the level INFO nothing is logged.
#
# It matters to those who measure or fine-tune such a GGUF file in transformers: StarCoder2-7B and
# stable-code-instruct-3b have a base of 1000000, so every tensor is right, but all positions after the first
# are rotated by other angles. Setting rope_parameters of the config before the model is made avoids it.
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
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = said.append
logging.getLogger("transformers").addHandler(handler)
transformers_logging.disable_progress_bar()

WIDTH, HEADS, VOCAB = 64, 2, 32
NORMS = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
SHAPES = {
    "token_embd": (VOCAB, WIDTH),
    "output": (VOCAB, WIDTH),
    **dict.fromkeys(NORMS, (WIDTH,)),
    **dict.fromkeys([f"blk.0.attn_{name}" for name in ("q", "k", "v", "output")], (WIDTH, WIDTH)),
    "blk.0.ffn_up": (2 * WIDTH, WIDTH),
    "blk.0.ffn_down": (WIDTH, 2 * WIDTH),
}


def write(architecture, base):
    writer = gguf.GGUFWriter(path := f"{architecture}-{base:g}.gguf", architecture)
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(base)
    if architecture == "llama":
        writer.add_layer_norm_rms_eps(1e-5)
    else:
        writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([str(i) for i in range(VOCAB)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    random = np.random.default_rng(0)
    shapes = dict(SHAPES)
    if architecture != "starcoder2":
        shapes["blk.0.ffn_gate"] = shapes["blk.0.ffn_up"]
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", 0.3 * random.standard_normal(shape).astype(np.float32))
        inner = name not in ("token_embd", "output", *NORMS)
        if (name in NORMS and architecture != "llama") or (inner and architecture == "starcoder2"):
            writer.add_tensor(f"{name}.bias", np.zeros(shape[0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(path, config=None):
    model = AutoModelForCausalLM.from_pretrained(".", gguf_file=path, config=config)
    with torch.no_grad():
        return model(torch.arange(256)[None] % VOCAB).logits


print("transformers", version("transformers"), "gguf", version("gguf"))
for architecture in ("llama", "starcoder2", "stablelm"):
    small, large = write(architecture, 1e4), write(architecture, 1e6)
    config = AutoConfig.from_pretrained(".", gguf_file=large)
    read = config.rope_parameters["rope_theta"]
    same = torch.equal(logits(small), logits(large))
    config.rope_parameters = config.rope_parameters | {"rope_theta": 1e6}
    change = (logits(large, config) - logits(small)).abs().max().item()
    print(f"{architecture}: 1e+06 is read as {read:g}, logits as with 1e+04: {same}, ", end="")
    print(f"with 1e+06 in the config they differ by up to {change:.2g}")
    assert change > 1e-2
    assert (read, same) == ((1e6, False) if architecture == "llama" else (1e4, True))
print(f"warnings: {len(said)}")
assert not said
EOF_PYTHON
