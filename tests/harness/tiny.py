"""Small random models whose weights already lie on a ternary grid, and a tokenizer of words."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from harness.ternary.linear import TernaryLinear

VOCABULARY = 96
# Blocks of 64 columns: two to the width, and a short last one to the inner width. Much smaller blocks
# of random trits would be too lopsided for the start of Eq. 5 to find their grid.
BLOCK = 64
WIDTH = 128
INNER = 176

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": INNER}

CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=32),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_GROUPED,
        head_dim=32,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "opt": lambda: transformers.OPTConfig(
        **_COMMON, ffn_dim=INNER, word_embed_proj_dim=WIDTH, max_position_embeddings=128
    ),
    # Attention with tables that no file holds: positions, and masks that differ from layer to layer.
    "codegen": lambda: transformers.CodeGenConfig(
        **_COMMON, n_inner=INNER, n_positions=128, rotary_dim=16, tie_word_embeddings=False
    ),
    "gptj": lambda: transformers.GPTJConfig(
        **_COMMON, n_inner=INNER, n_positions=128, rotary_dim=16, tie_word_embeddings=False
    ),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        **{key: value for key, value in _COMMON.items() if key != "num_attention_heads"},
        num_heads=4,
        intermediate_size=INNER,
        max_position_embeddings=128,
        attention_types=[[["global", "local"], 1], [["local"], 1]],
        window_size=8,
    ),
}

# Mixtures of experts: with a gate; with biases, and matrices stored transposed; without a gate; with
# scores that multiply what experts read.
_SHALLOW = {**_GROUPED, "num_hidden_layers": 2}
MIXTURES: dict[str, Any] = {
    "mixtral": lambda: transformers.MixtralConfig(**_SHALLOW, num_local_experts=4),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_SHALLOW, head_dim=32, num_local_experts=4, num_experts_per_tok=2
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **{key: value for key, value in _GROUPED.items() if key != "num_hidden_layers"},
        layers_block_type=["attention", "moe"],
        head_dim=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=INNER,
        moe_shared_expert_intermediate_size=INNER,
        mlp_hidden_act="silu",  # squared ReLU would leave some inputs dead, whose weights count as 0
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **_SHALLOW,
        head_dim=32,
        intermediate_size_mlp=INNER,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
    ),
}
TRANSPOSED = ("gpt_oss", "llama4")


def make_mixture(kind: str, dtype: torch.dtype = torch.bfloat16, ternary: bool = True) -> Any:
    """A random mixture of experts; with `ternary`, every decoder matrix on a grid of its rows."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MIXTURES[kind](), dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3 and "experts" in name and ternary:
                for matrix in parameter:
                    transposed = kind in TRANSPOSED
                    matrix.copy_(on_grid(*matrix.T.shape).T if transposed else on_grid(*matrix.shape))
            elif name.endswith("_proj.weight") and ternary:
                parameter.copy_(on_grid(*parameter.shape))
            elif "bias" in name:
                parameter.normal_(std=0.1)
    return model


def make_model(kind: str, dtype: torch.dtype = torch.bfloat16, ternary: bool = True) -> Any:
    """A random model of one architecture; with `ternary`, every decoder matrix on a grid of its rows."""
    computed = tables(CONFIGS[kind]())
    torch.manual_seed(0)
    # Not .to(dtype), which would round the rotary tables as well.
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=dtype).eval()
    with torch.no_grad():
        for name, table in computed.items():
            model.get_buffer(name).copy_(table)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                if ternary and name != "lm_head":
                    module.weight.copy_(on_grid(*module.weight.shape))
                if module.bias is not None:
                    # OPT's ReLU would leave some inputs of fc2 dead, whose weights count as 0.
                    module.bias.normal_(mean=2.0 if name.endswith("fc1") else 0.0, std=0.1)
    return model


def tables(config: Any) -> dict[str, torch.Tensor]:
    """The buffers of a model of `config`, as computed in float32.

    transformers computes them so when it loads a model of another dtype, but not when it makes one.
    """
    return dict(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).named_buffers())


def on_grid(rows: int, columns: int) -> torch.Tensor:
    """Weights alpha * t + mu with one grid a row; multiples of 1/512 that bfloat16 holds exactly."""
    trits = torch.randint(-1, 2, (rows, columns))
    alpha = torch.randint(24, 56, (rows, 1))
    mu = torch.randint(-20, 21, (rows, 1))
    return (alpha * trits + mu) / 512


def make_tokenizer() -> Any:
    """A word a token: w3 is token 3."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def words(count: int, seed: int = 0) -> str:
    """Random text of `count` tokens."""
    generator = random.Random(seed)
    return " ".join(f"w{generator.randrange(3, VOCABULARY)}" for _ in range(count))


def save(model: Any, folder: Path) -> Path:
    """A model folder as transformers writes it."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def keep_dense(model: nn.Module) -> None:
    """Make all ternary layers of a model multiply by dense weights."""
    for layer in model.modules():
        if isinstance(layer, TernaryLinear):
            layer.keep_dense(True)
