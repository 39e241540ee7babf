"""Mixtures of experts made from a dense model: its MLPs cut into slices, with a router of random weights.

Of s experts, number e has rows e·m/s to (e + 1)·m/s of gate_proj and up_proj, and the same columns of
down_proj (m is the intermediate size). The sum of all slices is the original MLP. The class is GraniteMoe,
with multipliers that make it compute what LLaMA does. Its router takes the softmax over the logits of the
chosen experts only; they are scaled by `FAINT`, which keeps their order but makes every weight exactly 1/k.
Matrices down_proj are multiplied by s to make up for that, exactly where s is a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from harness.errors import UserError
from harness.models.original import quiet_transformers

# Scale of the router's weights: exp of a difference of two logits is 1 in float32.
FAINT = 2.0**-40


@dataclass(frozen=True)
class Slicing:
    """How MLPs become experts.

    Attributes
    ----------
    words : str
        Its name in results.
    slices : int
        Number of slices.
    top : int
        Number of experts that a token is routed to.
    twice : bool
        Whether there are two experts for every slice. The router's weights for one are those for the other
        with the opposite sign, so that the largest half of the logits has one of each pair.
    """

    words: str
    slices: int
    top: int
    twice: bool = False

    @property
    def experts(self) -> int:
        """Number of experts."""
        return 2 * self.slices if self.twice else self.slices

    @property
    def is_whole(self) -> bool:
        """Whether every token passes through every slice once, so that the model equals the original."""
        return self.top == self.slices


def slice_mlps(model: Any, slicing: Slicing, seed: int = 0) -> Any:
    """Make a mixture of experts from a LLaMA.

    Parameters
    ----------
    model : transformers.LlamaForCausalLM
        The dense model, without biases.
    slicing : Slicing
        How to cut its MLPs.
    seed : int
        Seed of the routers' weights, which are drawn from a normal distribution.

    Returns
    -------
    transformers.GraniteMoeForCausalLM
        In the dtype of the dense model.

    Raises
    ------
    UserError
        If the model is of another class, has biases, or its intermediate size is no multiple of the slices.
    """
    config = model.config
    require_sliceable(config, slicing)
    transformers = quiet_transformers()
    shared = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    mixture = transformers.AutoModelForCausalLM.from_config(
        transformers.GraniteMoeConfig(
            **{name: getattr(config, name) for name in shared},
            intermediate_size=config.intermediate_size // slicing.slices,
            attention_multiplier=config.head_dim**-0.5,
            num_local_experts=slicing.experts,
            num_experts_per_tok=slicing.top,
        ),
        dtype=model.dtype,
    )
    generator = torch.Generator().manual_seed(seed)
    dense = model.state_dict()
    tensors = {name: tensor for name, tensor in dense.items() if ".mlp." not in name}
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        gate, up, down = (dense[f"{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        up_slices = torch.cat([part.unflatten(0, (slicing.slices, -1)) for part in (gate, up)], dim=1)
        down_slices = slicing.slices * down.unflatten(1, (slicing.slices, -1)).transpose(0, 1)
        router = FAINT * torch.randn(slicing.slices, config.hidden_size, generator=generator)
        if slicing.twice:
            up_slices, down_slices = up_slices.repeat(2, 1, 1), down_slices.repeat(2, 1, 1)
            router = torch.cat([router, -router])
        tensors[f"{layer}.block_sparse_moe.experts.gate_up_proj"] = up_slices
        tensors[f"{layer}.block_sparse_moe.experts.down_proj"] = down_slices
        tensors[f"{layer}.block_sparse_moe.router.weight"] = router
    mixture.load_state_dict(tensors)
    return mixture.eval()


def require_sliceable(config: Any, slicing: Slicing) -> None:
    """Refuse a model that `slice_mlps` cannot cut."""
    if config.model_type != "llama":
        raise UserError(f"only LLaMA's MLPs can be sliced into experts, not those of {config.model_type!r}")
    if (
        config.mlp_bias
        or config.attention_bias
        or config.head_dim * config.num_attention_heads != (config.hidden_size)
    ):
        raise UserError("a model with biases, or with heads of another width, cannot be sliced into experts")
    if config.intermediate_size % slicing.slices:
        raise UserError(
            f"the model's intermediate size {config.intermediate_size} is no multiple of {slicing.slices}, "
            "the number of slices"
        )
