"""Models in GGUF, each with the config that computes what its file says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.harness.models.gguf_files import (
    KEYS,
    NORM,
    RMS,
    SIZES,
    THETA,
    Array,
    Content,
    llama3_factors,
    random_model,
    tensors_of,
    without,
)


@dataclass
class Case:
    """A file and the class and settings of its model; `lost` biases are zero, and not in the file."""

    architecture: str
    model_class: str
    settings: dict[str, Any]
    keys: dict[str, Any]
    extra: dict[str, Array] = field(default_factory=dict)
    lost: tuple[str, ...] = ()

    def make(self) -> tuple[Any, Content]:
        model = random_model(self.model_class, **self.settings)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(self.lost or ("nothing",)):
                    parameter.zero_()
        tensors = tensors_of(model, self.architecture)
        if "o_proj.bias" in self.lost:
            tensors = {name: tensor for name, tensor in tensors.items() if "attn_output.bias" not in name}
        return model, Content(self.architecture, self.keys, tensors | self.extra)


def rotary(**own: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": THETA, **own}}


ROPE = {"rope.freq_base": THETA}
LLAMA_KEYS = {**KEYS, **RMS, **ROPE, "rope.dimension_count": 16, "vocab_size": 120}
SETTINGS = {**SIZES, **rotary(), "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
}
YARN_CONFIG = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = [1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0, 8.0]
SHORT = [1.0, 1.0, 1.1, 1.1, 1.2, 1.3, 1.4, 1.5]
WIDE = {
    **without(LLAMA_KEYS, "rope.dimension_count"),
    "attention.key_length": 48,
    "attention.value_length": 48,
}
GEMMA_KEYS = {**WIDE, "attention.sliding_window": 8}
GEMMA = {
    **SETTINGS,
    "head_dim": 48,
    "query_pre_attn_scalar": 48,
    "sliding_window": 8,
    "tie_word_embeddings": True,
}


def llama(keys: dict[str, Any] | None = None, **settings: Any) -> Case:
    return Case("llama", "LlamaForCausalLM", SETTINGS | settings, LLAMA_KEYS | (keys or {}))


def factors(values: list[float] | Array, name: str = "rope_freqs") -> dict[str, Array]:
    return {f"{name}.weight": np.array(values, dtype=np.float32)}


def gemma3(
    keys: dict[str, Any],
    slides: list[bool],
    full: dict[str, Any] | None = None,
    local: float = 1e4,
    **own: Any,
) -> Case:
    settings = GEMMA | {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention" if one else "full_attention" for one in slides],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": THETA, **(full or {})},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }
    return Case("gemma3", "Gemma3ForCausalLM", settings | own, GEMMA_KEYS | {"block_count": 4} | keys)


def phi3(keys: dict[str, Any], extra: dict[str, Array] | None = None, **settings: Any) -> Case:
    return Case("phi3", "Phi3ForCausalLM", SETTINGS | settings, LLAMA_KEYS | keys, extra or {})


def stablelm(parallel: bool, **biases: bool) -> Case:
    keys = {**KEYS, **NORM, **ROPE, "rope.dimension_count": 4, "use_parallel_residual": parallel}
    settings = SIZES | rotary(partial_rotary_factor=0.25) | {"use_parallel_residual": parallel} | biases
    return Case("stablelm", "StableLmForCausalLM", settings, keys)


def falcon(groups: int, norms: int, **settings: Any) -> Case:
    plain = without(SIZES, "intermediate_size", "num_key_value_heads")
    own = {
        **plain,
        **rotary(),
        "ffn_hidden_size": 96,
        "num_kv_heads": groups,
        "new_decoder_architecture": groups > 1,
        "num_ln_in_parallel_attn": norms,
    }
    keys = {**KEYS, **NORM, **ROPE, "attention.head_count_kv": groups, "tensor_data_layout": "jploski"}
    return Case("falcon", "FalconForCausalLM", own | settings, keys)


GPT = {"vocab_size": 120, "bos_token_id": None, "eos_token_id": None, "n_layer": 2, "n_head": 4}

CASES = {
    "llama": llama(),
    "llama with tied embeddings": llama(tie_word_embeddings=True),
    "llama with one group": llama({"attention.head_count_kv": [2, 2], "feed_forward_length": [96, 96]}),
    "llama with linear scaling": llama(
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.scaling.finetuned": True},
        **rotary(rope_type="linear", factor=4.0),
    ),
    "llama with the old key of linear scaling": llama(
        {"rope.scale_linear": 2.0}, **rotary(rope_type="linear", factor=2.0)
    ),
    "llama with yarn": llama(YARN, **rotary(**YARN_CONFIG)),
    "llama with a changed yarn": llama(
        YARN
        | {
            "rope.scaling.yarn_beta_fast": 8.0,
            "rope.scaling.yarn_beta_slow": 2.0,
            "rope.scaling.yarn_ext_factor": 1.0,
            "rope.scaling.attn_factor": 0.5,
        },
        **rotary(**YARN_CONFIG, beta_fast=8.0, beta_slow=2.0, attention_factor=0.5 * (1 + 0.1 * np.log(4.0))),
    ),
    "llama with a scaling that is none": llama({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    "llama 3.1": Case(
        "llama",
        "LlamaForCausalLM",
        SETTINGS
        | rotary(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        LLAMA_KEYS,
        factors(llama3_factors(THETA, 16, 8.0, 8192)),
    ),
    "llama with any factors": Case(
        "llama",
        "LlamaForCausalLM",
        SETTINGS
        | rotary(
            rope_type="longrope",
            long_factor=LONG,
            short_factor=LONG,
            attention_factor=1.0,
            original_max_position_embeddings=128,
        ),
        LLAMA_KEYS,
        factors(LONG),
    ),
    "llama with factors of one": Case("llama", "LlamaForCausalLM", SETTINGS, LLAMA_KEYS, factors([1.0] * 8)),
    "llama with biases": llama(attention_bias=True, mlp_bias=True),
    "llama with biases of q, k and v only": Case(
        "llama", "LlamaForCausalLM", SETTINGS | {"attention_bias": True}, LLAMA_KEYS, lost=("o_proj.bias",)
    ),
    "llama with biases of the MLP only": llama(mlp_bias=True),
    "llama with wide heads": Case("llama", "LlamaForCausalLM", SETTINGS | {"head_dim": 48}, WIDE),
    "llama with windows": Case(
        "llama",
        "MistralForCausalLM",
        SETTINGS | {"sliding_window": 8},
        LLAMA_KEYS | {"attention.sliding_window": 8},
    ),
    "llama with a window as long as its context": llama({"attention.sliding_window": 128}),
    "qwen2": Case("qwen2", "Qwen2ForCausalLM", SETTINGS, LLAMA_KEYS),
    "qwen1.5": Case("qwen2", "Qwen2ForCausalLM", SETTINGS, LLAMA_KEYS | {"use_parallel_residual": True}),
    "qwen2 with yarn": Case("qwen2", "Qwen2ForCausalLM", SETTINGS | rotary(**YARN_CONFIG), LLAMA_KEYS | YARN),
    "qwen2 with windows": Case(
        "qwen2",
        "Qwen2ForCausalLM",
        SETTINGS | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        LLAMA_KEYS | {"attention.sliding_window": 8},
    ),
    "qwen3": Case("qwen3", "Qwen3ForCausalLM", SETTINGS | {"head_dim": 16}, LLAMA_KEYS),
    "qwen3 with wide heads": Case("qwen3", "Qwen3ForCausalLM", SETTINGS | {"head_dim": 48}, WIDE),
    "qwen3 with biases": Case(
        "qwen3", "Qwen3ForCausalLM", SETTINGS | {"head_dim": 48, "attention_bias": True}, WIDE
    ),
    "gemma2": Case(
        "gemma2",
        "Gemma2ForCausalLM",
        GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        GEMMA_KEYS | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2 as it always is": Case("gemma2", "Gemma2ForCausalLM", GEMMA, GEMMA_KEYS),
    "gemma2 of 27B, whose scores have another scale": Case(
        "gemma2",
        "Gemma2ForCausalLM",
        GEMMA | {"num_hidden_layers": 46, "query_pre_attn_scalar": 16},
        GEMMA_KEYS | {"block_count": 46},
    ),
    "gemma3": gemma3({}, [True] * 4),
    "gemma3 with a period": gemma3({"attention.sliding_window_pattern": 3}, [True, True, False, True]),
    "gemma3 with a list of windows": gemma3(
        {"attention.sliding_window_pattern": [False, True, False, True]}, [False, True, False, True]
    ),
    "gemma3 with scaling, a base for windows and a cap": gemma3(
        {
            "attention.sliding_window_pattern": 2,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
            "rope.freq_base_swa": 2e3,
            "final_logit_softcapping": 3.0,
        },
        [True, False, True, False],
        {"rope_type": "linear", "factor": 8.0},
        local=2e3,
        final_logit_softcapping=3.0,
    ),
    "phi3": phi3({}),
    "phi3 with windows": phi3({"attention.sliding_window": 9}, sliding_window=9),
    "phi3 with part of each head rotated": phi3(
        {"rope.dimension_count": 12}, **rotary(partial_rotary_factor=0.75)
    ),
    "phi3 with factors by length": phi3(
        {"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.2},
        factors(LONG, "rope_factors_long") | factors(SHORT, "rope_factors_short"),
        original_max_position_embeddings=32,
        **rotary(
            rope_type="longrope",
            long_factor=LONG,
            short_factor=SHORT,
            attention_factor=1.2,
            original_max_position_embeddings=32,
        ),
    ),
    "starcoder2": Case(
        "starcoder2",
        "Starcoder2ForCausalLM",
        SIZES | rotary() | {"sliding_window": 8},
        {**KEYS, **NORM, **ROPE, "attention.sliding_window": 8},
    ),
    "stablelm": stablelm(parallel=False),
    "stablelm in parallel, with biases": stablelm(parallel=True, use_qkv_bias=True),
    "nemotron": Case(
        "nemotron",
        "NemotronForCausalLM",
        SIZES | rotary(partial_rotary_factor=0.5) | {"norm_eps": 1e-3, "head_dim": 16},
        {**KEYS, **ROPE, "attention.layer_norm_epsilon": 1e-3, "rope.dimension_count": 8},
    ),
    "nemotron with biases": Case(
        "nemotron",
        "NemotronForCausalLM",
        SIZES
        | rotary(partial_rotary_factor=0.5)
        | {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
        {**KEYS, **NORM, **ROPE, "rope.dimension_count": 8},
    ),
    "falcon of 7B": falcon(1, 1, multi_query=True),
    "falcon of 11B": falcon(2, 1),
    "falcon of 40B": falcon(2, 2),
    "falcon with biases": falcon(2, 2, bias=True),
    "bloom": Case(
        "bloom",
        "BloomForCausalLM",
        GPT | {"hidden_size": 64},
        KEYS | NORM | {"feed_forward_length": 256, "attention.head_count_kv": 4},
    ),
    "gpt2": Case(
        "gpt2",
        "GPT2LMHeadModel",
        GPT | {"n_embd": 64, "n_inner": 96, "n_positions": 128},
        without(KEYS, "attention.head_count_kv") | NORM,
    ),
    "lfm2": Case(
        "lfm2",
        "Lfm2ForCausalLM",
        SETTINGS
        | {
            "tie_word_embeddings": True,
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "norm_eps": 1e-5,
            "conv_L_cache": 4,
        },
        LLAMA_KEYS | {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 4},
    ),
    "qwen35": Case(
        "qwen35",
        "Qwen3_5ForCausalLM",
        SETTINGS
        | {
            "head_dim": 48,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
        }
        | rotary(partial_rotary_factor=0.25, mrope_section=[2, 2, 2], mrope_interleaved=True),
        WIDE
        | {
            "rope.dimension_count": 12,
            "rope.dimension_sections": [2, 2, 2, 0],
            "full_attention_interval": 2,
            "ssm.conv_kernel": 4,
            "ssm.state_size": 16,
            "ssm.group_count": 2,
            "ssm.time_step_rank": 6,
            "ssm.inner_size": 96,
        },
    ),
    "mamba": Case(
        "mamba",
        "MambaForCausalLM",
        {"vocab_size": 120, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}
        | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
        {
            **RMS,
            "context_length": 128,
            "embedding_length": 64,
            "block_count": 2,
            "feed_forward_length": 0,
            "attention.head_count": 0,
            "ssm.conv_kernel": 4,
            "ssm.state_size": 8,
            "ssm.inner_size": 128,
            "ssm.time_step_rank": 4,
        },
    ),
}
