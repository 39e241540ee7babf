"""Small configurations of the architectures that AutoModelForCausalLM knows."""

from __future__ import annotations

from typing import Any

VOCABULARY = 96
WIDTH = 128

# Sizes by the name of a setting, where an architecture has it.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "is_decoder": True,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "emb_dim"), WIDTH),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"), 2
    ),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 1),
    **dict.fromkeys(
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads"),
            *("decoder_attention_heads", "encoder_attention_heads"),
        ),
        4,
    ),
    "num_key_value_heads": 2,
    "head_dim": 32,
    **dict.fromkeys(
        (
            *("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"),
            *("ffn_hidden_size", "inner_dim", "d_ff", "d_inner", "dff", "dense_intermediate_size"),
        ),
        160,
    ),
    **dict.fromkeys(
        (
            *("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"),
            *("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"),
        ),
        96,
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 64),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 16),
    "v_head_dim": 32,
    "rotary_dim": 16,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 32),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    "mamba_d_ssm": 256,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "sliding_window": 8,
    # Vision towers, and what lies between them and the decoder.
    "image_size": 28,
    "patch_size": 14,
    **dict.fromkeys(("depth", "resampler_depth"), 2),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "text_hidden_size", "output_hidden_size"), WIDTH),
    **dict.fromkeys(("image_token_id", "image_token_index", "boi_token_id", "eoi_token_id"), VOCABULARY - 1),
    **dict.fromkeys(("video_token_id", "video_token_index", "audio_token_id"), VOCABULARY - 2),
    **dict.fromkeys(("vision_start_token_id", "boi_token_index"), VOCABULARY - 3),
    **dict.fromkeys(("vision_end_token_id", "eoi_token_index"), VOCABULARY - 4),
}

# The last two layers read keys and values of earlier ones.
_SHARED_KEYS: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def _rotary(*sections: int) -> dict[str, Any]:
    """Rotary positions in time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}
    return {"rope_parameters": rope}


# What some architectures need beside or instead of that; None takes a setting away.
_SPECIAL: dict[str, dict[str, Any]] = {
    "axk2": {"num_key_value_heads": 4},
    "cohere2_vision": {"alignment_intermediate_size": 192},
    "cosmos3_edge_text": _rotary(6, 5, 5),
    "deepseek_v32": {"num_key_value_heads": 4},
    "deepseek_v4": {"o_lora_rank": 32},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {
        **_SHARED_KEYS,
        "vocab_size_per_layer_input": VOCABULARY,
        "intermediate_size": [160] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {**_SHARED_KEYS, "vocab_size_per_layer_input": VOCABULARY},
    "gemma4_unified_text": {**_SHARED_KEYS, "vocab_size_per_layer_input": VOCABULARY},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    **dict.fromkeys(("glm4v_text", "glm_ocr_text", "paddleocr_vl_text"), _rotary(4, 6, 6)),
    "glm4v_moe_text": _rotary(2, 3, 3),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "longcat_flash": {"head_dim": 16, "moe_topk": 2, "zero_expert_num": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text"), _rotary(4, 6, 6)),
    "mllama_text_model": {"cross_attention_layers": [1]},
    "qwen2_vl_vision": {"embed_dim": WIDTH},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 7},
    "zamba": {"layers_block_type": ["mamba", "hybrid"]},
    "step3p5": {"mlp_layer_types": ["dense", "sparse"], "share_expert_dim": 96},
    # Two layers share their attention.
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_mem_blocks": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(model_type: str) -> Any:
    """Return a small configuration of a model type, with its parts small too.

    Raises
    ------
    Exception
        Of any kind, if the architecture takes no such sizes.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _small(CONFIG_MAPPING[model_type], _SPECIAL.get(model_type, {}))


def _small(kind: Any, special: dict[str, Any]) -> Any:
    fields = set(getattr(kind, "__dataclass_fields__", {}))
    sizes = {name: size for name, size in {**_SIZES, **special}.items() if name in fields or name in special}
    for name, part in kind.sub_configs.items():
        if not hasattr(part, "model_type"):  # AutoConfig: the parts may be of several types
            part = type(getattr(kind(), name))
        if name not in special and hasattr(part, "model_type"):
            small = _small(part, _SPECIAL.get(part.model_type, {}))
            sizes[name] = {**small.to_dict(), "model_type": part.model_type}
    return kind(**{name: size for name, size in sizes.items() if size is not None})
