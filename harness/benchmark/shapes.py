"""Shapes of real models, and models with random weights in these shapes."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch

from harness.models.decoder import Reader
from harness.models.original import quiet_transformers


@dataclass(frozen=True)
class Shape:
    """Dimensions of a model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int  # key-value heads
    vocabulary: int
    family: str = "Llama"

    @property
    def head_width(self) -> int:
        """Features per attention head."""
        return self.hidden // self.heads

    def depth(self, most: int | None) -> int:
        """Number of layers, limited to `most`; None for no limit."""
        return min(most or self.layers, self.layers)


SHAPES = {
    "tiny": Shape(96, 256, 3, 4, 2, 512),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152),
    "tinyllama-1.1b": Shape(2048, 5632, 22, 32, 4, 32000),
    "llama-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "llama-30b": Shape(6656, 17920, 60, 52, 52, 32000),
    "llama-65b": Shape(8192, 22016, 80, 64, 64, 32000),
    "llama2-70b": Shape(8192, 28672, 80, 64, 8, 32000),
    "llama3-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "qwen3-14b": Shape(5120, 17408, 40, 40, 8, 151936, "Qwen3"),
}

# Outlier channels of the random weights and norms: their share, and their scale. Language models have a
# few such channels, which make Gram matrices ill-conditioned.
OUTLIERS, OUTLIER_SCALE = 0.005, 10.0


def make_model(shape: str, layers: int, dtype: torch.dtype, positions: int = 2048) -> Any:
    """Make a random model with one decoder layer; `attach_empty_layers` can extend it to `layers`."""
    size = SHAPES[shape]
    config = getattr(quiet_transformers(), f"{size.family}Config")(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=layers,  # Qwen3Config makes a list with one setting per layer
        num_attention_heads=size.heads,
        num_key_value_heads=size.groups,
        head_dim=size.head_width,
        vocab_size=size.vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=True,  # an untied LM head would only take memory
    )
    config.num_hidden_layers = 1
    return quiet_transformers().AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_reader(shapes: dict[str, torch.Size], device: torch.device) -> Reader:
    """Return a reader of random weights; a name always gives the same weights."""

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        tensors = {}
        for name in names:
            generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
            shape = shapes[name]
            outlier = torch.rand(shape[-1], generator=generator, device=device) < OUTLIERS
            columns = torch.where(outlier, OUTLIER_SCALE, 1.0)
            if len(shape) == 2:
                weight = torch.randn(shape, generator=generator, device=device) * columns / shape[1] ** 0.5
            else:
                weight = columns
            tensors[name] = weight.bfloat16()
        return tensors

    return read
