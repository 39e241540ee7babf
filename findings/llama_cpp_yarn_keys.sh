#!/usr/bin/env bash
# llama.cpp (xllamacpp 2026.10.11549) ignores four of the YaRN keys of a llama or qwen2 GGUF file.
#
# GGUF has keys for all settings of YaRN: type, factor and original context, and then yarn_beta_fast,
# yarn_beta_slow, yarn_ext_factor and yarn_attn_factor. The converter of llama.cpp writes those that are in
# the config, for any architecture. One would expect the runtime to read them: it knows their names. But it
# reads the last four for a few architectures only, such as Grok. For others, llama and qwen2 among them, it
# computes with 32, 1, 1 and 1 in silence. Bounds given as options (--yarn-beta-fast) do count.
# --yarn-attn-factor does not, as it is computed again from the factor; what counts is the key attn_factor,
# which the converter writes for longrope.
#
# It matters to those who convert or quantize a model trained with other bounds or its own attention_factor:
# every tensor is right, but it is another model at every length, as YaRN is on from the first token. So a
# difference from the original looks like the quantization's. Options for the bounds avoid it, attn_factor in
# the file the rest.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check gguf==0.19.0 numpy==2.4.6 xllamacpp==2026.10.11549

env/bin/python - <<'EOF_PYTHON'
from importlib.metadata import version

import gguf
import numpy as np
import xllamacpp

WIDTH, HEADS, VOCAB, BIASED = 128, 2, 64, 40


def write(path, architecture, **keys):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(8.0)
    writer.add_rope_scaling_orig_ctx_len(512)
    for name, value in keys.items():
        getattr(writer, f"add_rope_scaling_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(ord("!") + i) for i in range(VOCAB - 1)] + ["!!"])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCAB)
    writer.add_token_merges(["! !"])
    random = np.random.default_rng(0)
    for name in ("token_embd", "output", "blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        shape = WIDTH if "norm" in name else (VOCAB, WIDTH)
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        matrix = 0.1 * random.standard_normal((WIDTH, WIDTH))
        writer.add_tensor(f"blk.0.{name}.weight", matrix.astype(np.float32))
    if architecture == "qwen2":
        for name in ("attn_q", "attn_k", "attn_v"):
            writer.add_tensor(f"blk.0.{name}.bias", np.zeros(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def scores(path, **options):
    """Log-probabilities of the token after 200 tokens, fewer than the original context."""
    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 256, 1, False, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    for name, value in options.items():
        setattr(settings, name, value)
    prompt = np.random.default_rng(1).integers(1, VOCAB, 200).tolist()
    # A bias changes which token is sampled, not the log-probabilities.
    request = {"prompt": prompt, "max_tokens": 1, "logprobs": VOCAB, "logit_bias": [[BIASED, 1000]]}
    answer = xllamacpp.Server(settings).handle_completions(request)
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert len(found) == VOCAB
    return np.array([entry["logprob"] for entry in sorted(found, key=lambda entry: entry["id"])])


print("xllamacpp", version("xllamacpp"), "gguf", version("gguf"))
others = {"yarn_beta_fast": 4.0, "yarn_beta_slow": 0.25, "yarn_ext_factor": 0.5, "yarn_attn_factor": 1.5}
for architecture in ("llama", "qwen2"):
    write("three.gguf", architecture)
    write("seven.gguf", architecture, **others)
    write("attention.gguf", architecture, attn_factors=1.5)
    plain = scores("three.gguf")

    def change(path, **options):
        return np.abs(scores(path, **options) - plain).max()

    print(f"{architecture}, largest change of a log-probability:")
    found = change("seven.gguf")
    print(f"  {len(others)} more keys in the file: {found:.3g}")
    assert found == 0
    for name, value in others.items():
        found = change("three.gguf", **{name: value})
        print(f"  {name} {value} as an option: {found:.3g}")
        assert found == 0 if name == "yarn_attn_factor" else found > 0.1
    found = change("attention.gguf")
    print(f"  attn_factor 1.5 in the file: {found:.3g}")
    assert found > 0.1
EOF_PYTHON
