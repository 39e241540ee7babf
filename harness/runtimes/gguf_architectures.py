"""How GGUF names, orders and describes the models of each architecture.

To add one, give it a row in `ARCHITECTURES`, and a function where it has keys of its own. The rows say what
llama.cpp computes; its file of the architecture in src/models/ has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf

from harness.runtimes.features import (
    ALL_BIASES,
    QKV_BIASES,
    head_width,
    require,
    require_activation,
    require_even_heads,
    require_experts_everywhere,
    window_of,
    window_period,
)

# A runtime scales frequencies in these ways for every architecture.
SCALED = ("default", "linear", "yarn")


@dataclass(frozen=True)
class Architecture:
    """An architecture of transformers in GGUF.

    Attributes
    ----------
    arch : gguf.MODEL_ARCH
        Its name there.
    interleaved : bool
        Whether rotary embeddings rotate rows 2i and 2i + 1 of each q and k head together; in transformers
        they rotate row i of the first half of the head with row i of the second half.
    biases : tuple of str
        Biases that llama.cpp reads.
    activation : str
        The activation that llama.cpp computes.
    scalings : tuple of str
        Scalings of rotary frequencies that llama.cpp computes.
    partial : bool
        Whether a part of each head may be rotated.
    windows : bool
        Whether llama.cpp's attention has sliding windows.
    norm_shift : float
        What GGUF adds to the weights of norms.
    own : callable
        Writes the architecture's own keys, and refuses what llama.cpp would compute otherwise.
    """

    arch: gguf.MODEL_ARCH
    interleaved: bool = False
    biases: tuple[str, ...] = ()
    activation: str = "silu"
    scalings: tuple[str, ...] = SCALED
    partial: bool = False
    windows: bool = False
    norm_shift: float = 0.0
    own: Callable[[gguf.GGUFWriter, Any], None] = lambda writer, config: None


def _gemma3(writer: gguf.GGUFWriter, config: Any) -> None:
    """Every n-th layer attends to everything; the others have windows and a rotary base of their own."""
    period = window_period(config)
    # llama.cpp takes the scale from the sizes; the biggest model is known by its number of layers.
    wide = config.hidden_size // config.num_attention_heads
    scalar = wide if config.num_hidden_layers == 62 else config.head_dim
    require(
        config.query_pre_attn_scalar == scalar,
        f"its query_pre_attn_scalar is {config.query_pre_attn_scalar}; llama.cpp computes with {scalar}",
    )
    require(config.attn_logit_softcapping is None, "its attention is softcapped")
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if period > 1:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(period)
    local = config.rope_parameters["sliding_attention"]
    require(local["rope_type"] == "default", "the rotary frequencies of its sliding windows are scaled")
    writer.add_rope_freq_base_swa(local["rope_theta"])


def _smollm3(writer: gguf.GGUFWriter, config: Any) -> None:
    expected = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    require(
        config.no_rope_layers == expected,
        "llama.cpp leaves out rotary embeddings in every fourth layer, and this model in others",
    )


def _phi3(writer: gguf.GGUFWriter, config: Any) -> None:
    require_even_heads(config)


def _experts(writer: gguf.GGUFWriter, config: Any, normalized: bool) -> None:
    """Keys of experts; `normalized`: whether llama.cpp makes the weights of a token's experts add up to 1."""
    does = getattr(config, "norm_topk_prob", True)  # Mixtral always does
    require(does == normalized, f"its norm_topk_prob is {does}; llama.cpp computes with {normalized}")
    require_experts_everywhere(config, "llama.cpp")
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _mixture(writer: gguf.GGUFWriter, config: Any) -> None:
    _experts(writer, config, normalized=True)


def _qwen2_moe(writer: gguf.GGUFWriter, config: Any) -> None:
    require(not config.tie_word_embeddings, "llama.cpp expects a head of its own, and this model has none")
    require_even_heads(config)
    _experts(writer, config, normalized=False)


def _olmoe(writer: gguf.GGUFWriter, config: Any) -> None:
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    require(heads == shared, f"it has {shared} heads of keys, and llama.cpp expects {heads}")
    require(config.clip_qkv is None, "its clip_qkv would be lost")
    _qwen2_moe(writer, config)


ARCHITECTURES = {
    "llama": Architecture(
        gguf.MODEL_ARCH.LLAMA, interleaved=True, biases=ALL_BIASES, scalings=(*SCALED, "llama3")
    ),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, interleaved=True, scalings=(*SCALED, "llama3")),
    "mixtral": Architecture(
        gguf.MODEL_ARCH.LLAMA, interleaved=True, scalings=(*SCALED, "llama3"), own=_mixture
    ),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, biases=QKV_BIASES),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3),
    "qwen2_moe": Architecture(gguf.MODEL_ARCH.QWEN2MOE, biases=QKV_BIASES, own=_qwen2_moe),
    "qwen3_moe": Architecture(gguf.MODEL_ARCH.QWEN3MOE, own=_mixture),
    "olmoe": Architecture(gguf.MODEL_ARCH.OLMOE, own=_olmoe),
    "gemma3_text": Architecture(
        gguf.MODEL_ARCH.GEMMA3,
        activation="gelu_pytorch_tanh",
        windows=True,
        norm_shift=1.0,
        own=_gemma3,
    ),
    "smollm3": Architecture(gguf.MODEL_ARCH.SMOLLM3, interleaved=True, own=_smollm3),
    "phi3": Architecture(
        gguf.MODEL_ARCH.PHI3,
        scalings=(*SCALED, "longrope"),
        partial=True,
        own=_phi3,
    ),
}


def add_settings(writer: gguf.GGUFWriter, architecture: Architecture, config: Any) -> list[str]:
    """Write the hyperparameters of a model, all but its rotary embeddings.

    Returns
    -------
    list of str
        What differs from the model, to be printed.
    """
    require_activation(config, architecture.activation)
    context, notes = config.max_position_embeddings, []
    window = None if architecture.windows else window_of(config)
    if window is not None:
        notes.append(
            f"llama.cpp has no sliding windows for {architecture.arch.name}: the file states a context of "
            f"{window} tokens, within which the model is the same (the original's is {context})"
        )
        context = window
    width = head_width(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    architecture.own(writer, config)
    return notes
