#!/usr/bin/env bash
# transformers 5.23.0: the list of models of transformers serve fails without a cache, then never changes.
#
# /v1/models lists the models in the Hugging Face cache, and the documentation says that a model appears there
# once it is downloaded. A machine that serves a local folder may have no cache, and one would expect an empty
# list. The server answers completions, but this request with status 500 until the cache folder exists. From
# then on one would expect the list to follow the cache. The server keeps the first list until it ends, so a
# model that is downloaded later does not appear, not even one that the server downloaded itself.
#
# It matters to clients that ask for the models first, as user interfaces do: they take the server for broken or
# do not offer a model that it has. Creating the cache folder avoids the first, a restart the second.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH HF_HUB_CACHE
export HF_HOME="$tmp/home" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check accelerate==1.15.0 fastapi==0.165.0 huggingface_hub==2.4.0 numpy==2.4.6 openai==3.57.0 tokenizers==0.23.3 torch==2.13.0 transformers==5.23.0 uvicorn==0.54.0

env/bin/python - <<'EOF_PYTHON'
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import constants, scan_cache_dir
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

logging.disable_progress_bar()
words = {word: i for i, word in enumerate("abcdefgh")}
LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
).save_pretrained("local")
PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a"))).save_pretrained(
    "local"
)


@contextmanager
def serve(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = ["env/bin/transformers", "serve", folder, "--device", "cpu", "--port", str(port)]
    with open("log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health").close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, Path("log").read_text()
                time.sleep(0.2)
        yield f"http://localhost:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def ask(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data, {"Content-Type": "application/json"})
        ) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, None


def listed(server):
    status, answer = ask(f"{server}/models")
    return status, answer and [model["id"] for model in answer["data"]]


def download(name):
    """Put a model into the cache as a download does: a reference, its snapshot and the file in it."""
    commit = "0" * 40
    folder = cache / f"models--{name.replace('/', '--')}"
    for part in ("refs", "blobs", f"snapshots/{commit}"):
        (folder / part).mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    shutil.copy("local/config.json", folder / "blobs/config")
    (folder / f"snapshots/{commit}/config.json").symlink_to("../../blobs/config")


cache = Path(constants.HF_HUB_CACHE)
print("transformers", version("transformers"), "huggingface_hub", version("huggingface_hub"))
assert not cache.exists()
with serve("local") as server:
    status, answer = ask(f"{server}/completions", {"model": "local", "prompt": "a", "max_tokens": 4})
    print(f"no cache folder: POST /v1/completions {status}, {answer['usage']['completion_tokens']} tokens")
    assert status == 200
    status, _ = listed(server)
    print(f"no cache folder: GET /v1/models {status}")
    assert status == 500
    cache.mkdir(parents=True)
    download("team/first")
    print("one model in the cache: GET /v1/models", *listed(server))
    assert listed(server) == (200, ["team/first"])
    download("team/second")
    in_cache = sorted(repo.repo_id for repo in scan_cache_dir().repos)
    print("two models in the cache:", *in_cache, "- GET /v1/models", *listed(server))
    assert in_cache == ["team/first", "team/second"] and listed(server) == (200, ["team/first"])
assert "CacheNotFound" in Path("log").read_text()
with serve("local") as server:
    status, names = listed(server)
    print("after a restart: GET /v1/models", status, sorted(names))
    assert status == 200 and sorted(names) == in_cache
EOF_PYTHON
