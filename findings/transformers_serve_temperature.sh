#!/usr/bin/env bash
# transformers 5.23.0: transformers serve ignores the temperature of a request and answers greedily.
#
# The server speaks OpenAI's API, where a temperature above 0 means sampling. One would expect 1.5 to give
# other answers for other seeds. The server copies temperature and top_p into the model's generation config,
# but sets do_sample only to turn sampling off, at temperature 0. If generation_config.json does not say
# do_sample, generate() is greedy and drops both. The answer has status 200 and no remark; the log of the
# server has one line about a flag that may be ignored. With do_sample in that file the same request samples.
#
# It matters to those who serve a base model, or one that they trained or quantized, as save_pretrained
# writes no do_sample: several samples of one prompt are one answer several times, and a temperature that was
# tuned on another server has no effect. "do_sample": true in generation_config.json avoids it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HOME="$tmp/home" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check accelerate==1.15.0 fastapi==0.165.0 numpy==2.4.6 openai==3.57.0 tokenizers==0.23.3 torch==2.13.0 transformers==5.23.0 uvicorn==0.54.0

env/bin/python - <<'EOF_PYTHON'
import json
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
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
for folder in ("saved", "sampling"):
    model.generation_config.do_sample = True if folder == "sampling" else None
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


@contextmanager
def serve(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = ["env/bin/transformers", "serve", folder, "--device", "cpu", "--port", str(port)]
    with open(f"{folder}.log", "w") as log:
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
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        server.wait()


def answer(server, folder, **options):
    body = {"model": folder, "prompt": "one", "max_tokens": 7, **options}
    request = urllib.request.Request(
        f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]["text"]


print("transformers", version("transformers"))
answers, greedy = {}, {}
for folder in ("saved", "sampling"):
    stated = json.loads((Path(folder) / "generation_config.json").read_text()).get("do_sample", "absent")
    print(f"do_sample in generation_config.json: {stated}")
    with serve(folder) as server:
        answers[folder] = [answer(server, folder, temperature=1.5, seed=seed) for seed in range(4)]
        greedy[folder] = answer(server, folder, temperature=0)
    for seed, text in enumerate(answers[folder]):
        print(f"  temperature 1.5, seed {seed}: {text}")
    print(f"  temperature 0:           {greedy[folder]}")
assert greedy["saved"] == greedy["sampling"] == "".join(words[1:])
assert set(answers["saved"]) == {greedy["saved"]}
assert len(set(answers["sampling"])) > 1
EOF_PYTHON
