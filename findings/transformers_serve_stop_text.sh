#!/usr/bin/env bash
# transformers 5.23.0: the answer of transformers serve contains the stop text, and even what follows it.
#
# One would expect what OpenAI's documentation of this API says: the returned text does not contain the stop
# sequence. The server passes "stop" on as stop_strings of generate(), which ends after the token
# that completes the text and keeps it. So the answer ends with the stop text, and with the rest of that
# token: stopping at "," gives ", two" where a token is a comma and a word. A stream sends the same text.
# finish_reason is "stop", as if the text had been cut.
#
# It matters to those who point a client of OpenAI's API at this server: "Observation:" of an agent, the next
# "Q:" of a few-shot prompt or a line break is part of the answer, and an exact match fails. Cutting off as
# many characters as the stop text has is wrong, too. Cutting at the first stop text in the answer is right.
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

# A model that counts: the likeliest token after a word is the next word. StopStringCriteria wants to be able to
# write "abcdef" in tokens, whatever the stop text is.
words = ["one", ", two", ", three", ", four", ", five", ", six", ", seven", "abcdef"]
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
        choice = client.completions.create(model="counting", prompt="one", max_tokens=6, **options).choices[0]
        return choice.text, choice.finish_reason

    def streamed(**options):
        chunks = client.completions.create(
            model="counting", prompt="one", max_tokens=6, stream=True, **options
        )
        return "".join(chunk.choices[0].text for chunk in chunks)

    print("transformers", version("transformers"), "openai", version("openai"))
    whole, _ = answer()
    print(f"without stop: {whole!r}")
    assert whole == "".join(words[1:7])
    for stop, seen in ((" four", ", two, three, four"), (",", ", two")):
        text, reason = answer(stop=[stop])
        stream = streamed(stop=[stop])
        print(f"stop {stop!r}: {text!r}, finish_reason {reason}, streamed {stream!r}")
        print(f"  without the stop text: {whole.partition(stop)[0]!r}")
        assert text == stream == seen and reason == "stop"
        assert stop in text and stop not in text.partition(stop)[0]
finally:
    server.terminate()
    server.wait()
EOF_PYTHON
