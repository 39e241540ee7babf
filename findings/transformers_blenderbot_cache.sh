#!/usr/bin/env bash
# transformers 5.23.0: BlenderbotForCausalLM of its own default config cannot generate.
#
# The decoder of an encoder-decoder model is a causal language model of its own, and the documentation shows
# BlenderbotForCausalLM as one. One would expect generate() to work for any number of layers. But the cache is
# made for config.num_hidden_layers, which in these configs is a name of encoder_layers. Blenderbot has 2
# layers in the encoder and 24 in the decoder, so the third layer finds no cache: IndexError, "list index out
# of range", in the forward pass as well, as use_cache is true by default. Bart, Marian, MBart, Pegasus,
# PLBart and others have the same fault, hidden by defaults with equal halves. The model with its encoder
# works.
#
# It matters to those who calibrate, measure or prune the decoder alone: a pruned encoder breaks the decoder,
# which it does not use. use_cache=False avoids it, or encoder_layers = decoder_layers in the config, where no
# encoder is made of it.
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
import transformers
from transformers import BlenderbotConfig, BlenderbotForCausalLM, BlenderbotForConditionalGeneration
from transformers.utils import logging

logging.set_verbosity_error()
print("transformers", version("transformers"), "torch", version("torch"))
default = BlenderbotConfig()
print(
    f"BlenderbotConfig(): encoder_layers {default.encoder_layers}, decoder_layers {default.decoder_layers},",
    f"num_hidden_layers {default.num_hidden_layers}, use_cache {default.use_cache}",
)
assert (default.num_hidden_layers, default.decoder_layers, default.use_cache) == (2, 24, True)

# All but the numbers of layers is made small.
small = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ids = torch.arange(4, 16)[None]
how = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}


def attempt(call):
    """What a call returns, or the error that it raises."""
    try:
        with torch.no_grad():
            return call()
    except IndexError as problem:
        return problem


def report(name, result):
    print(f"  {name}: {result!r}" if isinstance(result, IndexError) else f"  {name}: runs")
    return isinstance(result, IndexError)


model = BlenderbotForCausalLM(BlenderbotConfig(**small)).eval()
assert len(model.model.decoder.layers) == 24
print("BlenderbotForCausalLM, 2 and 24 layers:")
assert report("model(ids)", attempt(lambda: model(ids)))
assert report("generate", attempt(lambda: model.generate(ids, **how)))
uncached = attempt(lambda: model.generate(ids, use_cache=False, **how))
assert not report("generate, use_cache=False", uncached)
model.config.encoder_layers = 24
cached = attempt(lambda: model.generate(ids, **how))
assert not report("generate, encoder_layers set to 24", cached) and torch.equal(cached, uncached)

whole = BlenderbotForConditionalGeneration(BlenderbotConfig(**small)).eval()
print("BlenderbotForConditionalGeneration, 2 and 24 layers:")
assert not report("generate", attempt(lambda: whole.generate(ids, **how)))

for name in ("Bart", "BigBirdPegasus", "Marian", "MBart", "Mvp", "PLBart", "Pegasus"):
    make, config = getattr(transformers, f"{name}ForCausalLM"), getattr(transformers, f"{name}Config")
    broken = []
    for encoder in (2, 1):
        decoder = make(config(**small, encoder_layers=encoder, decoder_layers=2)).eval()
        broken.append(isinstance(attempt(lambda decoder=decoder: decoder(ids)), IndexError))
    print(f"{name}ForCausalLM, 2 and 2 layers: raises {broken[0]}; 1 and 2: raises {broken[1]}")
    assert broken == [False, True]
EOF_PYTHON
