"""llama.cpp, as the wheel xllamacpp has it: what it computes from a file, and how it decodes a type."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xllamacpp
from numpy.typing import NDArray
from xllamacpp import xllamacpp as library

STEPS = 12
ASCII = 40  # a token that is a character of its own in the vocabularies used here


class LlamaCpp:
    """A model file in llama.cpp, on one thread, its cache and its attention in float32."""

    def __init__(self, file: Path, context: int = 256) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = context, 1, False, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(settings)

    def greedy(self, prompt: list[int], vocabulary: int, steps: int = STEPS) -> tuple[list[int], Any]:
        """Continue a prompt; return the tokens, and the log-probabilities of all tokens before each."""
        tokens, found = list(prompt), []
        for _ in range(steps):
            found.append(self.next(tokens, vocabulary))
            tokens.append(int(found[-1].argmax()))
        return tokens[len(prompt) :], np.array(found)

    def next(self, tokens: list[int], vocabulary: int) -> NDArray[np.float64]:
        """Log-probabilities of the token that follows."""
        answer = self._server.handle_completions(
            {
                "prompt": tokens,
                "max_tokens": 1,
                "logprobs": vocabulary,
                # The server leaves out a token that ends inside a character, and says nothing of the others.
                # A bias changes what is sampled, not the log-probabilities.
                "logit_bias": [[ASCII, 1000]],
                "cache_prompt": False,
            }
        )
        row = np.full(vocabulary, np.nan)
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        return row

    def text(self, prompt: str, steps: int) -> str:
        """The text that follows a prompt, each token the most probable."""
        answer = self._server.handle_completions({"prompt": prompt, "max_tokens": steps, "temperature": 0})
        return answer["choices"][0]["text"]


def log_probabilities(model: Any, prompt: list[int], continued: list[int]) -> NDArray[np.float64]:
    """What a model of this package gives for the same tokens."""
    tokens = torch.tensor([prompt + continued[:-1]])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(prompt) - 1 :]
    return logits.double().log_softmax(dim=-1).numpy()


def decode(kind: str, packed: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
    """Decode rows of a type by ggml's own function."""
    function = getattr(ctypes.CDLL(library.__file__), f"dequantize_row_{kind.lower().replace('_k', '_K')}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    packed = np.ascontiguousarray(packed)
    values = np.empty((len(packed), columns), dtype=np.float32)
    function(packed.ctypes.data, values.ctypes.data, values.size)
    return values
