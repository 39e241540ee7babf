"""From the tensors of a GGUF file to those of a model in transformers: names, layout, and rounding."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from harness.errors import UserError
from harness.models.gguf_config import ATTENTION_BIASES, MLP_BIASES
from harness.models.gguf_file import GgufFile
from harness.models.gguf_rope import ROPE_TENSORS

# Norms that multiply by 1 + w; GGUF stores 1 + w.
SHIFTED_NORM = {
    "gemma2": re.compile(r"norm\.weight$"),
    "gemma3": re.compile(r"norm\.weight$"),
    "nemotron": re.compile(r"norm\.weight$"),
    "qwen35": re.compile(r"(?<!ssm_)norm\.weight$"),
}

# Convolutions over channels, of which GGUF drops the dimension of one input.
CONVOLUTIONS = (".shortconv.conv.weight", ".ssm_conv1d.weight")

# transformers stores these transposed in GPT-2.
TRANSPOSED = (".attn_qkv.weight", ".attn_output.weight", ".ffn_up.weight", ".ffn_down.weight")


def read_weights(
    file: GgufFile, model: Any, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Read the weights of a model.

    Parameters
    ----------
    file : GgufFile
        The file.
    model : PreTrainedModel
        The model that `describe` describes, on torch's meta device.
    dtype : torch.dtype
        dtype of the weights; each is rounded once.

    Returns
    -------
    dict of torch.Tensor
        The weights by their names in the model.
    tuple of str
        Tensors of the file for multi-token prediction, for which transformers has no layers.

    Raises
    ------
    UserError
        If the file lacks a tensor, or has one that the model lacks, or one of another shape.
    """
    config, expected = model.config, model.state_dict()
    names = _names_in_file(expected, file.architecture, config.num_hidden_layers)
    if config.tie_word_embeddings:
        names.pop("lm_head.weight")
    predicting = range(config.num_hidden_layers, file.value(f"{file.architecture}.block_count"))
    ignored = tuple(n for n in file.tensors if n.startswith(tuple(f"blk.{i}." for i in predicting)))
    known = {*names.values(), *ROPE_TENSORS, *ignored}
    lacking = [own for own in names.values() if own not in file.tensors and not _is_zero(own, file)]
    _require_none(lacking, file, "lacks the tensors")
    unknown = [own for own in file.tensors if own not in known]
    _require_none(unknown, file, f"has tensors that {type(model).__name__} does not have:")

    stored = {name: own for name, own in names.items() if own in file.tensors}
    _require_none(
        [own for name, own in stored.items() if _shape(own, file, config) != expected[name].shape],
        file,
        "has tensors of the wrong shape:",
    )
    weights = {name: torch.zeros(expected[name].shape, dtype=dtype) for name in names.keys() - stored.keys()}
    for name, own in stored.items():
        weights[name] = _arranged(_rounded(own, file, dtype), own, file.architecture, config).contiguous()
    return weights, ignored


def _require_none(names: list[str], file: GgufFile, what: str) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise UserError(f"{file.path} {what} {', '.join(sorted(names)[:5])}{more}")


def _names_in_file(names: Iterable[str], architecture: str, layers: int) -> dict[str, str]:
    """Map the names of a model's tensors to those in GGUF."""
    import gguf

    archs = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(archs[architecture], layers)
    found = {}
    for name in names:
        # gguf's own converter renames this one before it asks.
        asked = name.replace(".dt_bias", ".dt_proj.bias")
        # Some architectures have their names without that of the body, and none for a shared head.
        own = [known.get_name(one, (".weight", ".bias")) for one in (asked, asked.partition(".")[2])]
        found[name] = "output.weight" if name == "lm_head.weight" else own[0] or own[1] or name
    return found


def _is_zero(name: str, file: GgufFile) -> bool:
    """Whether a bias is one of several that the config turns on together, and the file has only others."""
    return any(
        name.endswith(group) and any(other.endswith(group) for other in file.tensors)
        for group in (ATTENTION_BIASES, MLP_BIASES)
    )


def _rounded(name: str, file: GgufFile, dtype: torch.dtype) -> torch.Tensor:
    """Undo what GGUF does to the values of a tensor, in float32, and round them."""
    shifted = SHIFTED_NORM.get(file.architecture)
    if shifted and shifted.search(name):
        return file.tensor(name, dtype, lambda values: values - 1)
    if name.endswith(".ssm_a"):  # the logarithm of a decay, of which GGUF stores -exp
        return file.tensor(name, dtype, lambda values: torch.log(-values))
    return file.tensor(name, dtype)


def _shape(name: str, file: GgufFile, config: Any) -> torch.Size | None:
    """Shape of a tensor in the model's layout; None if it cannot have that layout."""
    try:
        return _arranged(torch.empty(file.shape(name), device="meta"), name, file.architecture, config).shape
    except RuntimeError:
        return None


def _arranged(tensor: torch.Tensor, name: str, architecture: str, config: Any) -> torch.Tensor:
    """Undo what GGUF does to the order of a tensor's rows and columns."""
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return _halves(tensor, heads)
    if architecture == "falcon" and ".attn_qkv." in name:
        return _grouped_qkv(tensor, config.num_attention_heads, config.num_kv_heads)
    if architecture == "bloom" and ".attn_qkv." in name:
        rows = tensor.reshape(3, config.num_attention_heads, -1, *tensor.shape[1:])
        return rows.transpose(0, 1).reshape(tensor.shape)
    if architecture == "gpt2" and name.endswith(TRANSPOSED):
        return tensor.T
    if architecture == "qwen35":
        tensor = _grouped_values(tensor, name, config)
    return tensor.unsqueeze(1) if name.endswith(CONVOLUTIONS) else tensor


def _halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k with the two halves of each head one after the other; GGUF interleaves them."""
    rows = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)


def _grouped_qkv(tensor: torch.Tensor, heads: int, groups: int) -> torch.Tensor:
    """Rows of q, k and v group by group; GGUF has all of q first, then k and v."""
    rows = tensor.reshape(heads + 2 * groups, -1, *tensor.shape[1:])
    parts = rows.split([heads, groups, groups])
    grouped = [part.reshape(groups, -1, *rows.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).reshape(tensor.shape)


def _grouped_values(tensor: torch.Tensor, name: str, config: Any) -> torch.Tensor:
    """Value heads of linear attention in the order of their key heads; GGUF repeats the key heads instead."""
    part = name.split(".")[-2] if name.endswith((".weight", ".bias")) else name.split(".")[-1]
    keys = config.linear_num_key_heads
    repeats = config.linear_num_value_heads // keys

    def grouped(values: torch.Tensor) -> torch.Tensor:
        heads = values.reshape(repeats, keys, -1, *values.shape[1:])
        return heads.transpose(0, 1).reshape(values.shape)

    if part in ("ssm_a", "ssm_dt", "ssm_alpha", "ssm_beta", "attn_gate"):
        return grouped(tensor)
    if part in ("attn_qkv", "ssm_conv1d"):  # q and k come first
        first = 2 * config.linear_key_head_dim * keys
        return torch.cat([tensor[:first], grouped(tensor[first:])])
    if part == "ssm_out":
        return grouped(tensor.T).T
    return tensor
