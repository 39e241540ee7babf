#!/usr/bin/env bash
# transformers 5.23.0: transformers serve says that it fills in the middle, and only glues the suffix on.
#
# One would expect the "suffix" of OpenAI's completions: the text after the gap. The model reads prompt and
# suffix and writes what belongs between them, and the answer is that insertion alone. The server's own
# documentation names "suffix" for fill-in-the-middle insertion. It generates from the prompt alone; the model
# never sees the suffix, which is appended to the answer, and to a stream as its last piece. So every suffix
# gives the same tokens, and clients that put the answer into the gap have the suffix twice.
#
# It matters to those who measure a quantized code model on filling in, or let an editor complete code by it:
# no error tells that the model was not asked the question, and exact matches fail for all answers.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HOME="$tmp/home" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check accelerate==1.15.0 fastapi==0.165.0 numpy==2.4.6 openai==3.57.0 tokenizers==0.23.3 torch==2.13.0 transformers==5.23.0 uvicorn==0.54.0

env/bin/python - <<'EOF_PYTHON'
import socket
import subprocess
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

import torch
from openai import OpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

logging.disable_progress_bar()

# A model that counts: the likeliest token after a word is the next word.
words = ["one", ", two", ", three", ", four", ", five", ", six", ", seven", ", eight"]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="one"))
backend.pre_tokenizer = pre_tokenizers.Split(", ", "merged_with_next")
backend.decoder = decoders.Fuse()
width = len(words)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=width,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=None,
        eos_token_id=None,
    )
)
with torch.no_grad():
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    model.model.layers[0].mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(width))
    model.lm_head.weight.copy_(torch.eye(width).roll(1, 0))
model.save_pretrained("counting")
PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained("counting")

with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
command = ["env/bin/transformers", "serve", "counting", "--device", "cpu", "--port", str(port)]
with open("log", "w") as log:
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
try:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health").close()
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.2)
    client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none")

    def answer(**options):
        reply = client.completions.create(model="counting", prompt="one", max_tokens=3, **options)
        return reply.choices[0].text, reply.usage.prompt_tokens

    def streamed(**options):
        chunks = client.completions.create(
            model="counting", prompt="one", max_tokens=3, stream=True, **options
        )
        return [chunk.choices[0].text for chunk in chunks if chunk.choices and chunk.choices[0].text]

    print("transformers", version("transformers"), "openai", version("openai"))
    alone, tokens = answer()
    print(f"prompt 'one': {alone!r}, {tokens} token read")
    assert alone == ", two, three, four" and tokens == 1
    for suffix in (", six", ", seven"):
        text, read = answer(suffix=suffix)
        pieces = streamed(suffix=suffix)
        print(f"suffix {suffix!r}: {text!r}, {read} token read, stream ends with {pieces[-1]!r}")
        assert text == alone + suffix and read == tokens and pieces[-1] == suffix and "".join(pieces) == text
finally:
    server.terminate()
    server.wait()
EOF_PYTHON
