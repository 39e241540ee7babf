"""Shapes of real models, and random models of these shapes."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch

from harness.models.decoder import Reader
from harness.models.original import quiet_transformers


@dataclass(frozen=True)
class Shape:
    """How large a model is."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int  # heads of keys and values
    vocabulary: int
    family: str = "Llama"

    @property
    def head_width(self) -> int:
        """Features of a head."""
        return self.hidden // self.heads

    def depth(self, most: int | None) -> int:
        """Its number of layers, or that most of them; None is all."""
        return min(most or self.layers, self.layers)


SHAPES = {
    "tiny": Shape(96, 256, 3, 4, 2, 512),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152),
    "llama-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "llama-30b": Shape(6656, 17920, 60, 52, 52, 32000),
    "llama-65b": Shape(8192, 22016, 80, 64, 64, 32000),
    "llama3-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "qwen3-14b": Shape(5120, 17408, 40, 40, 8, 151936, "Qwen3"),
}


# Of the random weights and norms: the share of columns that stand out, and by how much. Language
# models have a few such channels, and they are what makes Gram matrices ill conditioned.
OUTLIERS, OUTLIER_SCALE = 0.005, 10.0


def make_model(shape: str, layers: int, dtype: torch.dtype, positions: int = 2048) -> Any:
    """A random model of a shape with one layer, to which `attach_empty_layers` may give so many."""
    size = SHAPES[shape]
    config = getattr(quiet_transformers(), f"{size.family}Config")(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=layers,  # for which Qwen3's has a list of settings
        num_attention_heads=size.heads,
        num_key_value_heads=size.groups,
        head_dim=size.head_width,
        vocab_size=size.vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=True,  # a head of its own would only take memory
    )
    config.num_hidden_layers = 1
    return quiet_transformers().AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_reader(shapes: dict[str, torch.Size], device: torch.device) -> Reader:
    """Weights by name, the same at every call."""

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
