"""From the settings of a GGUF file to the config of a model that computes the same.

Each architecture has a function that reads its keys. A key that no function reads, and that is not known to
be harmless, is refused by name: it may change what the model computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness.errors import UserError
from harness.models.gguf_file import GgufFile
from harness.models.gguf_keys import Keys
from harness.models.gguf_rope import rope_parameters

# Keys of an architecture that say nothing about what a decoder computes.
HARMLESS = {
    "rope.scaling.finetuned",  # whether the model was trained with its scaling
    "tensor_data_layout",  # which every file of the architecture has
    "pooling_type",  # of embeddings
}

# What a key must be, if it is there: its value says that nothing unusual is computed.
NEUTRAL = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.scale": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 1,
    "embedding_scale": 1,
    "residual_scale": 1,
    "attention.sliding_window": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "nextn_predict_layers": 0,
    "use_parallel_residual": False,
    "ssm.dt_b_c_rms": False,
}

ATTENTION_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_qkv.bias", "attn_output.bias")
MLP_BIASES = ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")

# Name of a class of transformers, and settings of its config.
Described = tuple[str, dict[str, Any]]


def describe(file: GgufFile) -> Described:
    """Name the class of a file's model and the settings of its config.

    Raises
    ------
    UserError
        If the model has experts, its architecture is unknown, or a key of the file would change what the
        model computes and has no counterpart in the config.
    """
    import gguf

    keys = Keys(file)
    experts = keys.get("expert_count", 0)
    if experts or keys.has("_exps.weight"):
        raise UserError(
            f"{file.path} has {experts or 'several'} experts in a layer (architecture {file.architecture}); "
            "models with experts cannot be read from GGUF"
        )
    build = ARCHITECTURES.get(file.architecture)
    if build is None:
        raise UserError(
            f"{file.path} has the architecture {file.architecture}, which cannot be read from GGUF; pass the "
            f"original model's folder instead, or a file of {', '.join(ARCHITECTURES)}"
        )
    if file.architecture not in gguf.MODEL_ARCH_NAMES.values():
        raise UserError(
            f"{file.path} has the architecture {file.architecture}, which the installed gguf does not know; "
            "upgrade it: pip install --upgrade gguf"
        )
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path} lacks the tensor token_embd.weight; is the file complete?")
    name, settings = build(keys)
    for key in keys.unread():
        value = keys.get(key)
        if key not in HARMLESS and (key not in NEUTRAL or value != NEUTRAL[key]):
            keys.refuse(key, value)
    vocabulary = file.shape("token_embd.weight")[0]
    settings |= {
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{
            f"{role}_token_id": _token(file.value(f"tokenizer.ggml.{key}_token_id"), vocabulary)
            for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    }
    return name, settings


def _token(token: int | None, vocabulary: int) -> int | None:
    """A special token; some files name one beyond their vocabulary, which stands for none."""
    return token if token is not None and token < vocabulary else None


def _sizes(keys: Keys, groups: int | None = None) -> dict[str, Any]:
    """Read what every transformer has; `groups` is the number of heads of k and v, if it is known."""
    keys.get("vocab_size")  # the embedding tells it
    width, heads = keys.need("embedding_length"), keys.alike("attention.head_count")
    head = keys.alike("attention.key_length", width // heads)
    if (values := keys.alike("attention.value_length", head)) != head:
        keys.refuse("attention.value_length", values)
    return {
        "max_position_embeddings": keys.need("context_length"),
        "hidden_size": width,
        "intermediate_size": keys.alike("feed_forward_length"),
        "num_hidden_layers": keys.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups or keys.alike("attention.head_count_kv", heads),
        "head_dim": head,
    }


def _llama_like(keys: Keys, partial: bool = False) -> dict[str, Any]:
    """Read what transformers with rotary embeddings and RMS norms have."""
    sizes = _sizes(keys)
    return {
        **sizes,
        "rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(keys, sizes, partial),
    }


def _window(keys: Keys, sizes: dict[str, Any]) -> int | None:
    """Sliding window of the attention; one as long as the context is none."""
    window = keys.alike("attention.sliding_window", 0)
    return window if 0 < window < sizes["max_position_embeddings"] else None


def _llama(keys: Keys) -> Described:
    settings = _llama_like(keys)
    biases = {"attention_bias": keys.has(*ATTENTION_BIASES), "mlp_bias": keys.has(*MLP_BIASES)}
    window = _window(keys, settings)
    if window is None:
        return "LlamaForCausalLM", settings | biases
    if any(biases.values()):  # transformers has no such model
        keys.refuse("attention.sliding_window", window)
    return "MistralForCausalLM", settings | {"sliding_window": window}


def _windowed(settings: dict[str, Any], window: int | None) -> dict[str, Any]:
    """Settings of Qwen's windows, which all layers have here."""
    if window is None:
        return settings
    return settings | {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}


def _qwen2(keys: Keys) -> Described:
    settings = _llama_like(keys)
    keys.get("use_parallel_residual")  # files of Qwen1.5 claim it, but no model of this architecture has it
    return "Qwen2ForCausalLM", _windowed(settings, _window(keys, settings))


def _qwen3(keys: Keys) -> Described:
    settings = _llama_like(keys) | {"attention_bias": keys.has(*ATTENTION_BIASES)}
    return "Qwen3ForCausalLM", _windowed(settings, _window(keys, settings))


def _gemma(keys: Keys, period: int, biggest: int) -> dict[str, Any]:
    """Read what Gemma 2 and 3 share; the biggest model scales its scores by another width than a head's."""
    settings = _sizes(keys)
    layers, heads = settings["num_hidden_layers"], settings["num_attention_heads"]
    scalar = settings["hidden_size"] // heads if layers == biggest else settings["head_dim"]
    window = keys.get("attention.sliding_window", 0)
    pattern = keys.get("attention.sliding_window_pattern", period)
    if not isinstance(pattern, list):  # every period-th layer attends to everything
        pattern = [pattern and (i + 1) % pattern != 0 for i in range(layers)]
    sliding = [window and slides for slides in pattern]
    return settings | {
        "rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon"),
        "query_pre_attn_scalar": scalar,
        "sliding_window": window or settings["max_position_embeddings"],
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding],
        "attention_bias": keys.has(*ATTENTION_BIASES),
    }


def _gemma2(keys: Keys) -> Described:
    settings = _gemma(keys, period=2, biggest=46)
    return "Gemma2ForCausalLM", settings | {
        "attn_logit_softcapping": keys.get("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": keys.get("final_logit_softcapping", 30.0) or None,
        "rope_parameters": rope_parameters(keys, settings),
    }


def _gemma3(keys: Keys) -> Described:
    settings = _gemma(keys, period=6, biggest=62)
    # Layers with a window have a base of their own, and no scaling.
    local = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10000.0)}
    return "Gemma3ForCausalLM", settings | {
        "final_logit_softcapping": keys.get("final_logit_softcapping", 0) or None,
        "rope_parameters": {
            "full_attention": rope_parameters(keys, settings),
            "sliding_attention": local,
        },
    }


def _phi3(keys: Keys) -> Described:
    settings = _llama_like(keys, partial=True)
    _require_even_heads(keys, settings)
    rope = settings["rope_parameters"]
    # The config prefers its own number to that of the scaling.
    original = rope.get("original_max_position_embeddings", settings["max_position_embeddings"])
    return "Phi3ForCausalLM", settings | {
        "original_max_position_embeddings": original,
        "sliding_window": _window(keys, settings),
    }


def _starcoder2(keys: Keys) -> Described:
    settings = _sizes(keys)
    _require_even_heads(keys, settings)
    return "Starcoder2ForCausalLM", settings | {
        "norm_epsilon": keys.need("attention.layer_norm_epsilon"),
        "rope_parameters": rope_parameters(keys, settings),
        "sliding_window": _window(keys, settings),
        "use_bias": keys.has(*ATTENTION_BIASES, *MLP_BIASES),
    }


def _stablelm(keys: Keys) -> Described:
    settings = _sizes(keys)
    _require_even_heads(keys, settings)
    parallel = not keys.has(".ffn_norm.weight")
    if (stated := keys.get("use_parallel_residual", parallel)) != parallel:
        keys.refuse("use_parallel_residual", stated)
    return "StableLmForCausalLM", settings | {
        "layer_norm_eps": keys.need("attention.layer_norm_epsilon"),
        "rope_parameters": rope_parameters(keys, settings, partial=True),
        "use_parallel_residual": parallel,
        "use_qkv_bias": keys.has(*ATTENTION_BIASES[:3]),
    }


def _nemotron(keys: Keys) -> Described:
    settings = _sizes(keys)
    return "NemotronForCausalLM", settings | {
        "norm_eps": keys.need("attention.layer_norm_epsilon"),
        "rope_parameters": rope_parameters(keys, settings, partial=True),
        "attention_bias": keys.has(*ATTENTION_BIASES),
        "mlp_bias": keys.has(*MLP_BIASES),
    }


def _falcon(keys: Keys) -> Described:
    settings = _sizes(keys)
    _require_even_heads(keys, settings)
    groups, norms = settings.pop("num_key_value_heads"), 2 if keys.has(".attn_norm_2.weight") else 1
    return "FalconForCausalLM", settings | {
        "ffn_hidden_size": settings.pop("intermediate_size"),
        "layer_norm_epsilon": keys.need("attention.layer_norm_epsilon"),
        "rope_parameters": rope_parameters(keys, settings),
        "num_kv_heads": groups,
        "new_decoder_architecture": groups > 1 or norms == 2,
        "num_ln_in_parallel_attn": norms,
        "bias": keys.has(*ATTENTION_BIASES, *MLP_BIASES),
    }


def _bloom(keys: Keys) -> Described:
    settings = _sizes(keys)
    _require_even_heads(keys, settings)
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    if settings["intermediate_size"] != 4 * width:
        keys.refuse("feed_forward_length", settings["intermediate_size"])
    if settings["num_key_value_heads"] != heads:
        keys.refuse("attention.head_count_kv", settings["num_key_value_heads"])
    if (bias := keys.get("attention.max_alibi_bias", 8.0)) != 8:
        keys.refuse("attention.max_alibi_bias", bias)
    return "BloomForCausalLM", {
        "hidden_size": width,
        "n_layer": settings["num_hidden_layers"],
        "n_head": heads,
        "layer_norm_epsilon": keys.need("attention.layer_norm_epsilon"),
    }


def _gpt2(keys: Keys) -> Described:
    settings = _sizes(keys)
    _require_even_heads(keys, settings)
    return "GPT2LMHeadModel", {
        "n_positions": settings["max_position_embeddings"],
        "n_embd": settings["hidden_size"],
        "n_inner": settings["intermediate_size"],
        "n_layer": settings["num_hidden_layers"],
        "n_head": settings["num_attention_heads"],
        "layer_norm_epsilon": keys.need("attention.layer_norm_epsilon"),
    }


def _lfm2(keys: Keys) -> Described:
    groups = keys.need("attention.head_count_kv")
    groups = groups if isinstance(groups, list) else [groups] * keys.need("block_count")
    if len({*groups} - {0}) != 1:
        keys.refuse("attention.head_count_kv", groups)
    settings = _sizes(keys, max(groups))
    return "Lfm2ForCausalLM", settings | {
        "layer_types": ["full_attention" if count else "conv" for count in groups],
        "norm_eps": keys.need("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": keys.need("shortconv.l_cache"),
        "conv_bias": keys.has(".shortconv.in_proj.bias", ".shortconv.conv.bias", ".shortconv.out_proj.bias"),
        "block_auto_adjust_ff_dim": False,  # the file has the adjusted width
        "rope_parameters": rope_parameters(keys, settings),
    }


def _qwen35(keys: Keys) -> Described:
    settings = _sizes(keys)
    heads, inner = keys.need("ssm.time_step_rank"), keys.need("ssm.inner_size")
    interval = keys.need("full_attention_interval")
    layers = settings["num_hidden_layers"] - keys.get("nextn_predict_layers", 0)
    rope = rope_parameters(keys, settings, partial=True) | {
        "mrope_section": [size for size in keys.need("rope.dimension_sections") if size],
        "mrope_interleaved": True,
    }
    return "Qwen3_5ForCausalLM", settings | {
        "num_hidden_layers": layers,
        "layer_types": [
            "linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)
        ],
        "rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon"),
        "linear_conv_kernel_dim": keys.need("ssm.conv_kernel"),
        "linear_key_head_dim": keys.need("ssm.state_size"),
        "linear_num_key_heads": keys.need("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": inner // heads,
        "rope_parameters": rope,
    }


def _mamba(keys: Keys) -> Described:
    for unused in ("vocab_size", "context_length", "feed_forward_length", "attention.head_count"):
        keys.get(unused)
    width, inner = keys.need("embedding_length"), keys.need("ssm.inner_size")
    if inner % width:
        keys.refuse("ssm.inner_size", inner)
    return "MambaForCausalLM", {
        "hidden_size": width,
        "expand": inner // width,
        "num_hidden_layers": keys.need("block_count"),
        "conv_kernel": keys.need("ssm.conv_kernel"),
        "state_size": keys.need("ssm.state_size"),
        "time_step_rank": keys.need("ssm.time_step_rank"),
        "layer_norm_epsilon": keys.need("attention.layer_norm_rms_epsilon"),
    }


def _require_even_heads(keys: Keys, settings: dict[str, Any]) -> None:
    """Refuse heads whose size the config of this model cannot state, and drop it."""
    head = settings.pop("head_dim")
    if head * settings["num_attention_heads"] != settings["hidden_size"]:
        keys.refuse("attention.key_length", head)


ARCHITECTURES: dict[str, Callable[[Keys], Described]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen35": _qwen35,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "starcoder2": _starcoder2,
    "stablelm": _stablelm,
    "nemotron": _nemotron,
    "falcon": _falcon,
    "bloom": _bloom,
    "gpt2": _gpt2,
    "lfm2": _lfm2,
    "mamba": _mamba,
}
