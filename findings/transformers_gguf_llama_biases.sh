#!/usr/bin/env bash
# transformers 5.23.0 drops the biases of a llama GGUF file without a word.
#
# Llama models may have biases in attention and feed-forward (attention_bias and mlp_bias in their config).
# A GGUF file has no key for it: the tensors are there or not. One would expect from_pretrained with
# gguf_file to see them, as it sees output.weight to decide about tied embeddings, or at least to report
# tensors that it has no use for, as it does for a safetensors file. It makes a model without biases
# and skips them; logits are those of a file without these tensors, and nothing is logged.
#
# It matters to those who convert a llama with biases, trained or quantized, and check the GGUF file in
# transformers: a model with trained parameters missing loads as if all were well. Counting the tensors of
# the file against the parameters of the model shows it.
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
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
transformers_logging.disable_progress_bar()

WIDTH, HEADS, VOCAB = 64, 2, 32
LINEAR = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
sizes = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
torch.manual_seed(0)
original = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)).eval()
with torch.no_grad():
    for name, parameter in original.named_parameters():
        if "norm" not in name:
            parameter.normal_(std=0.2)
layer = original.model.layers[0]


def interleaved(tensor):
    """Order the rows of query or key as a GGUF file of llama has them: pairs of the rotation side by side."""
    halves = tensor.reshape(HEADS, 2, WIDTH // HEADS // 2, *tensor.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)


def write(path, biases):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(original.config.rms_norm_eps)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([str(i) for i in range(VOCAB)])
    tensors = {
        "token_embd.weight": original.model.embed_tokens.weight,
        "output.weight": original.lm_head.weight,
        "output_norm.weight": original.model.norm.weight,
        "blk.0.attn_norm.weight": layer.input_layernorm.weight,
        "blk.0.ffn_norm.weight": layer.post_attention_layernorm.weight,
    }
    for name, module in LINEAR.items():
        tensors[f"blk.0.{name}.weight"] = layer.get_submodule(module).weight
        if biases:
            tensors[f"blk.0.{name}.bias"] = layer.get_submodule(module).bias
    for name, tensor in tensors.items():
        array = tensor.detach().numpy()
        writer.add_tensor(name, interleaved(array) if "attn_q" in name or "attn_k" in name else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


print("transformers", version("transformers"), "gguf", version("gguf"))
ids = torch.arange(VOCAB)[None]
with torch.no_grad():
    with_biases = original(ids).logits
    logits = {}
    for biases in (True, False):
        write("model.gguf", biases)
        model = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf")
        logits[biases] = model(ids).logits
        found = len(gguf.GGUFReader("model.gguf").tensors)
        print(f"GGUF, biases {biases}: {found} tensors in the file, {len(model.state_dict())} in the model")
    for module in LINEAR.values():
        layer.get_submodule(module).bias.zero_()
    without = original(ids).logits
lost = float((logits[True] - with_biases).abs().max())
print(f"logits of the file with biases differ from the original's by {lost:.2g}, warnings: {len(said)}")
assert torch.equal(logits[True], logits[False]) and lost > 0.1 and not said
# All else was read as it should be.
assert torch.allclose(logits[False], without, atol=1e-4)

# safetensors: the same model, and a config that does not mention biases.
original.save_pretrained("folder")
LlamaForCausalLM.from_pretrained("folder", config=LlamaConfig(**sizes))
print(f"safetensors, same case: warnings: {len(said)}")
assert "q_proj.bias" in "".join(said)
EOF_PYTHON
