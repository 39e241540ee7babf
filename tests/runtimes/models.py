"""Small models of every architecture that is exported, with what their layers can have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import transformers

from tests.harness.export.checkpoints import WIDE

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_FACTORS = np.random.default_rng(0).uniform(1, 4, (2, 32)).tolist()
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": _FACTORS[0],
    "short_factor": _FACTORS[1],
    "original_max_position_embeddings": 384,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3}
NARROW = {"moe_intermediate_size": 256}
BASES = {
    "full_attention": {**LINEAR, "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}


def _of(config: Any, layers: int = 2, **own: Any) -> Callable[[], Any]:
    return lambda: config(**{**WIDE, "num_hidden_layers": layers, **own})


def _gemma(*kinds: str, **own: Any) -> Callable[[], Any]:
    return _of(
        transformers.Gemma3TextConfig,
        layers=len(kinds),
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=8,
        layer_types=[f"{kind}_attention" for kind in kinds],
        rope_parameters=BASES,
        **own,
    )


CONFIGS = {
    "llama": _of(transformers.LlamaConfig),
    "llama, biases": _of(transformers.LlamaConfig, attention_bias=True, mlp_bias=True),
    "llama, linear": _of(transformers.LlamaConfig, rope_parameters=LINEAR),
    "llama, yarn": _of(transformers.LlamaConfig, rope_parameters=YARN),
    "llama, llama3": _of(transformers.LlamaConfig, rope_parameters=LLAMA3),
    "mistral": _of(transformers.MistralConfig, sliding_window=None),
    "qwen2": _of(transformers.Qwen2Config, rope_parameters=YARN),
    "qwen3": _of(transformers.Qwen3Config, head_dim=128, tie_word_embeddings=True),
    "mixtral": _of(transformers.MixtralConfig, **EXPERTS),
    "qwen3_moe": _of(transformers.Qwen3MoeConfig, **EXPERTS, **NARROW, head_dim=128, norm_topk_prob=True),
    "qwen2_moe": _of(transformers.Qwen2MoeConfig, **EXPERTS, **NARROW, shared_expert_intermediate_size=512),
    "olmoe": _of(transformers.OlmoeConfig, **EXPERTS, num_key_value_heads=4, rope_parameters=LINEAR),
    "smollm3": _of(transformers.SmolLM3Config, layers=5),
    "phi3": _of(transformers.Phi3Config),
    "phi3, partial": _of(transformers.Phi3Config, rope_parameters=PARTIAL),
    "gemma3": _gemma("sliding", "full", "sliding"),
    "gemma3, no window": _gemma("full", "full"),
}

# Only llama.cpp computes these.
LLAMA_CPP = {
    "mixtral, yarn": _of(transformers.MixtralConfig, **EXPERTS, head_dim=64, rope_parameters=YARN),
    # Whatever its router gives: rounded inputs would choose other experts.
    "mixtral, all experts": _of(transformers.MixtralConfig, num_experts=3, num_experts_per_tok=3),
    "llama, yarn and its factor": _of(
        transformers.LlamaConfig, rope_parameters={**YARN, "attention_factor": 1.3}
    ),
    "phi3, longrope": _of(
        transformers.Phi3Config,
        rope_parameters=LONG,
        max_position_embeddings=768,
        original_max_position_embeddings=384,
    ),
    "gemma3, softcapping": _gemma("sliding", "full", final_logit_softcapping=0.7),
}

# Only mlx_lm computes these.
MLX = {
    "qwen3_moe, weights as they are": _of(
        transformers.Qwen3MoeConfig, **EXPERTS, **NARROW, head_dim=64, norm_topk_prob=False
    ),
    "qwen3_moe, a layer without experts": _of(
        transformers.Qwen3MoeConfig, **EXPERTS, **NARROW, norm_topk_prob=True, mlp_only_layers=[0]
    ),
    "smollm3, biases": _of(transformers.SmolLM3Config, layers=4, attention_bias=True, mlp_bias=True),
}
