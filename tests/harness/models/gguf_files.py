"""GGUF files of small models in transformers, as llama.cpp's converter lays them out, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

Array = NDArray[Any]

SIZES = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
KEYS = {
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "block_count": 2,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
RMS = {"attention.layer_norm_rms_epsilon": 1e-5}
NORM = {"attention.layer_norm_epsilon": 1e-5}
THETA = 5e4


def random_model(model_class: str, **settings: Any) -> Any:
    """A model with random weights, norms and biases, large enough that each of them shows in the logits."""
    torch.manual_seed(0)
    found = getattr(transformers, model_class)
    model = found(found.config_class(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(0, 1)
            elif parameter.ndim == 1:
                shift = 0 if name.endswith("bias") else float(parameter.mean().round())
                parameter.copy_(shift + 0.2 * torch.randn(parameter.shape))
            else:
                parameter.normal_(std=0.15)
    return model


def interleaved(rows: Array, heads: int) -> Array:
    """Rows of q or k as llama.cpp's LLaMA has them: row i and row i + d/2 of a head side by side."""
    depth = len(rows) // heads
    order = [
        head * depth + i + half
        for head in range(heads)
        for i in range(depth // 2)
        for half in (0, depth // 2)
    ]
    return rows[order]


def by_role(rows: Array, groups: int, heads: int) -> Array:
    """Rows of q, k and v that come group by group, as all of q, all of k, all of v."""
    depth = len(rows) // (heads + 2 * groups)
    blocks = rows.reshape(-1, depth, *rows.shape[1:])
    per = heads // groups + 2
    order = [g * per + i for g in range(groups) for i in range(per - 2)]
    order += [g * per + per - 2 for g in range(groups)] + [g * per + per - 1 for g in range(groups)]
    return blocks[order].reshape(rows.shape)


def tiled(rows: Array, keys: int, repeats: int, first: int = 0) -> Array:
    """Value heads of linear attention in llama.cpp's order: that of all keys, `repeats` times over."""
    values = rows[first:]
    depth = len(values) // (keys * repeats)
    order = [(k * repeats + r) * depth + i for r in range(repeats) for k in range(keys) for i in range(depth)]
    return np.concatenate([rows[:first], values[order]])


def stored(name: str, values: Array, architecture: str, config: Any) -> Array:
    """What llama.cpp's converter stores for a tensor, given its name in GGUF."""
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return interleaved(values, heads)
    if architecture == "falcon" and ".attn_qkv." in name:
        return by_role(values, config.num_kv_heads, config.num_attention_heads)
    if architecture == "bloom" and ".attn_qkv." in name:
        return by_role(values, config.n_head, config.n_head)
    if architecture == "gpt2" and values.ndim == 2 and name.startswith("blk."):
        return values.T
    shifted = name.endswith("norm.weight") and "ssm_norm" not in name
    if architecture in ("gemma2", "gemma3", "nemotron", "qwen35") and shifted:
        return values + 1
    if name.endswith(".ssm_a"):
        values = -np.exp(values)
    if "conv" in name and values.ndim == 3:
        values = values.squeeze(1)
    if architecture == "qwen35":
        keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
        part, repeats = name.split(".")[-2 if name.endswith(("weight", "bias")) else -1], heads // keys
        if part in ("ssm_a", "ssm_dt", "ssm_alpha", "ssm_beta", "attn_gate"):
            return tiled(values, keys, repeats)
        if part in ("attn_qkv", "ssm_conv1d"):
            return tiled(values, keys, repeats, 2 * keys * config.linear_key_head_dim)
        if part == "ssm_out":
            return tiled(values.T, keys, repeats).T
    return values


def tensors_of(model: Any, architecture: str) -> dict[str, Array]:
    """A model's tensors under their names in GGUF."""
    arch = {known: arch for arch, known in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    tied = getattr(model, "all_tied_weights_keys", {})
    tensors = {}
    for name, tensor in model.state_dict().items():
        asked = name.replace("dt_bias", "dt_proj.bias")
        short = asked.removeprefix(f"{model.base_model_prefix}.")
        found = [names.get_name(one, try_suffixes=(".weight", ".bias")) for one in (asked, short)]
        own = found[0] or found[1] or "output.weight"
        if name not in tied:
            tensors[own] = stored(own, tensor.float().numpy(), architecture, model.config)
    return tensors


@dataclass
class Content:
    """What a GGUF file holds; tests change it before they write it."""

    architecture: str
    keys: dict[str, Any]
    tensors: dict[str, Array]
    kinds: dict[str, Type] = field(default_factory=dict)
    general: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path, parts: int = 1, before: Callable[[Any], None] = lambda writer: None) -> Path:
        """Write the file, or all parts of it; returns the first part's path."""
        names = np.array_split(list(self.tensors), parts)
        paths = part_paths(path, parts)
        for number, (file, own) in enumerate(zip(paths, names, strict=True)):
            writer = gguf.GGUFWriter(file, self.architecture)
            if parts > 1:
                writer.add_uint16("split.no", number)
                writer.add_uint16("split.count", parts)
                writer.add_int32("split.tensors.count", len(self.tensors))
            if number == 0:
                add_keys(writer, {f"{self.architecture}.{key}": value for key, value in self.keys.items()})
                add_keys(writer, self.general)
                before(writer)
            for name in own:
                kind = self.kinds.get(str(name), Type.F32)
                data = self.tensors[str(name)]
                packed = data if data.dtype != np.float32 else gguf.quantize(data, kind)
                writer.add_tensor(str(name), np.ascontiguousarray(packed), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return paths[0]


def part_paths(path: Path, parts: int) -> list[Path]:
    if parts == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i:05d}-of-{parts:05d}.gguf") for i in range(1, parts + 1)]


def add_keys(writer: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def llama3_factors(base: float, size: int, factor: float, old: int) -> Array:
    """rope_freqs.weight as Llama 3.1 defines it: by which each frequency is divided."""
    frequencies = base ** -(np.arange(0, size, 2) / size)
    wavelengths = 2 * np.pi / frequencies
    factors = []
    for wavelength in wavelengths:
        if wavelength < old / 4:
            factors.append(1.0)
        elif wavelength > old:
            factors.append(factor)
        else:
            smooth = (old / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def without(keys: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in names}


def tokens(count: int = 100) -> torch.Tensor:
    return torch.randint(3, 120, (2, count), generator=torch.Generator().manual_seed(1))


def logits(model: Any, batch: Iterable[Any] | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens() if batch is None else batch).logits
