"""What mlx_lm computes of each architecture, and how its config.json says it.

To add one, give it a row in `ARCHITECTURES`, and a function where mlx_lm reads settings under other names
than transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from harness.runtimes.features import (
    ALL_BIASES,
    QKV_BIASES,
    head_width,
    require,
    require_activation,
    require_biases,
    require_even_heads,
    require_experts_everywhere,
    require_scaling,
    require_separate_experts,
    rotary,
    row_of,
    window_of,
    window_period,
)


@dataclass(frozen=True)
class Architecture:
    """What mlx_lm computes of an architecture (mlx_lm/models/).

    Attributes
    ----------
    biases : tuple of str
        Biases that it reads.
    scalings : tuple of str
        Scalings of rotary frequencies.
    activation : str
        The activation.
    partial : bool
        Whether a part of each head may be rotated.
    windows : bool
        Whether attention has sliding windows.
    renamed : tuple of (str, str)
        Parts of names in transformers, and those of mlx_lm in their place.
    own : callable
        From the model's config to entries of config.json under mlx_lm's names; refuses what mlx_lm would
        compute otherwise.
    """

    biases: tuple[str, ...] = ()
    scalings: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    activation: str = "silu"
    partial: bool = False
    windows: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    own: Callable[[Any], dict[str, Any]] = lambda config: {}

    def name_of(self, name: str) -> str:
        """Name of a tensor or module in mlx_lm."""
        for old, new in self.renamed:
            name = name.replace(old, new)
        return name


def _llama(config: Any) -> dict[str, Any]:
    kinds = ["full_attention"] * config.num_hidden_layers
    if window_of(config) is not None:
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
        require("full_attention" in kinds, "all of its layers have sliding windows, which mlx_lm cannot load")
    return {"layer_types": kinds}


def _even(config: Any) -> dict[str, Any]:
    require_even_heads(config)
    return {}


def _phi3(config: Any) -> dict[str, Any]:
    require_even_heads(config)
    return {"partial_rotary_factor": rotary(config)[0].get("partial_rotary_factor") or 1.0}


def _gemma3(config: Any) -> dict[str, Any]:
    capped = config.attn_logit_softcapping or config.final_logit_softcapping
    require(not capped, "its softcapping would be lost")
    local = config.rope_parameters["sliding_attention"]
    require(local["rope_type"] == "default", "the rotary frequencies of its sliding windows are scaled")
    return {"sliding_window_pattern": window_period(config), "rope_local_base_freq": local["rope_theta"]}


def _qwen2_moe(config: Any) -> dict[str, Any]:
    require_even_heads(config)
    require(not config.norm_topk_prob, "its norm_topk_prob would be lost")
    require_experts_everywhere(config, "mlx_lm")
    return {}


def _qwen3_moe(config: Any) -> dict[str, Any]:
    # transformers writes the number of experts under another name.
    return {"num_experts": config.num_experts, "head_dim": head_width(config)}


def _olmoe(config: Any) -> dict[str, Any]:
    require(config.clip_qkv is None, "its clip_qkv would be lost")
    return {}


_EXPERTS = (".mlp.experts.", ".mlp.switch_mlp.")

ARCHITECTURES = {
    "llama": Architecture(ALL_BIASES, own=_llama),
    "mistral": Architecture(windows=True, own=_llama),
    # mlx_lm reads no scaling of Mixtral and of mixtures of Qwen.
    "mixtral": Architecture(
        scalings=("default",),
        renamed=(
            (".mlp.experts.", ".block_sparse_moe.switch_mlp."),
            (".mlp.gate.", ".block_sparse_moe.gate."),
        ),
        own=_even,
    ),
    "qwen2": Architecture(QKV_BIASES, own=_even),
    "qwen2_moe": Architecture(QKV_BIASES, scalings=("default",), renamed=(_EXPERTS,), own=_qwen2_moe),
    "qwen3": Architecture(),
    "qwen3_moe": Architecture(scalings=("default",), renamed=(_EXPERTS,), own=_qwen3_moe),
    "olmoe": Architecture(renamed=(_EXPERTS,), own=_olmoe),
    "gemma3_text": Architecture(
        scalings=("default", "linear"), activation="gelu_pytorch_tanh", windows=True, own=_gemma3
    ),
    "smollm3": Architecture(ALL_BIASES, windows=True, own=_llama),
    # mlx_lm takes the long factors of longrope for short texts too.
    "phi3": Architecture(scalings=("default",), partial=True, own=_phi3),
}


def architecture_of(model: Any) -> Architecture:
    """Look up a model's architecture; refuse one that mlx_lm or this table does not have."""
    return row_of(model, ARCHITECTURES, "MLX")


def settings_of(model: Any, tensors: Iterable[str]) -> dict[str, Any]:
    """Entries of config.json under the names that mlx_lm reads.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model, ternary or original.
    tensors : iterable of str
        Names of its tensors that are not ternary.

    Raises
    ------
    Refused
        If mlx_lm would compute something else than the model.
    """
    architecture, config, names = architecture_of(model), model.config, list(tensors)
    require_activation(config, architecture.activation)
    require_biases(names, architecture.biases)
    require_separate_experts(names)
    window = window_of(config)
    require(
        architecture.windows or window is None, f"its attention in windows of {window} tokens would be lost"
    )
    rope, _ = rotary(config)
    kind = require_scaling(rope, architecture.scalings, architecture.partial)
    if kind == "yarn":
        own = [key for key in ("attention_factor", "truncate") if rope.get(key) is not None]
        require(not own, f"the {own and own[0]} of its yarn scaling would be lost")
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if kind == "default" else {**rope, "type": kind},
        **architecture.own(config),
    }
