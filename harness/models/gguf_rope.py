"""Rotary embeddings of a GGUF file, as the config of a model states them."""

from __future__ import annotations

import math
from typing import Any

import torch

from harness.errors import UserError
from harness.models.gguf_keys import Keys

FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = {FACTORS, LONG, SHORT}

# Of all Llama 3 models that scale their frequencies; GGUF stores only the factors that follow.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Factors are stored in float32, after a few operations in it.
FACTORS_MATCH = 1e-4


def rope_parameters(keys: Keys, sizes: dict[str, Any], partial: bool = False) -> dict[str, Any]:
    """Read the rotary embeddings of a file.

    Parameters
    ----------
    keys : Keys
        Settings of the file.
    sizes : dict
        Sizes of the model, as in its config.
    partial : bool
        Whether the model can rotate only the first part of each head.

    Returns
    -------
    dict
        ``rope_parameters`` of a config.

    Raises
    ------
    UserError
        If the file scales its frequencies in a way that transformers does not have.
    """
    head = sizes.get("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    context = sizes["max_position_embeddings"]
    rope = {"rope_theta": keys.get("rope.freq_base", 10000.0)}
    turned = keys.get("rope.dimension_count", head)
    if turned != head:
        if not partial:
            keys.refuse("rope.dimension_count", turned)
        share = turned / head
        # transformers rounds the product down.
        rope["partial_rotary_factor"] = share if int(head * share) == turned else math.nextafter(share, 1)

    factor = keys.get("rope.scaling.factor", 0) or keys.get("rope.scale_linear", 0) or 1
    kind = keys.get("rope.scaling.type", "linear" if factor != 1 else "none")
    for key, value in (("rope.freq_base", rope["rope_theta"]), ("rope.scaling.factor", factor)):
        if isinstance(value, str) or not 0 < value < math.inf:
            keys.refuse(key, value)
    attention = keys.get("rope.scaling.attn_factor", 1.0)
    original = keys.get("rope.scaling.original_context_length")
    found = ROPE_TENSORS & keys.file.tensors.keys()
    factors = {name: keys.file.tensor(name, torch.float32).tolist() for name in found}
    for name, values in factors.items():
        if len(values) != turned // 2:
            raise UserError(
                f"{keys.file.path}: the tensor {name} has {len(values)} factors for {turned // 2} frequencies"
            )

    if kind == "none" or (kind == "linear" and factor == 1):
        own: dict[str, Any] = {}
    elif kind == "linear":
        own = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        own = _yarn(keys, factor, attention, original or context)
        attention = 1.0
    elif kind == "longrope" and factor == 1 and LONG in found:
        own = {}
    else:
        keys.refuse("rope.scaling.type", kind)

    if found and own:
        raise UserError(
            f"{keys.file.path} scales its rotary frequencies twice, by {kind} and by the tensor "
            f"{min(found)}; transformers has no such model"
        )
    if {LONG, SHORT} <= found and FACTORS not in found:
        own = _by_length(factors[LONG], factors[SHORT], attention, original or context, context)
        attention = 1.0
    elif found == {FACTORS}:
        own = _divided(factors[FACTORS], rope["rope_theta"], turned, original, context)
    elif found:
        raise UserError(f"{keys.file.path} has the tensor {min(found)} without its counterpart")
    if attention != 1:
        keys.refuse("rope.scaling.attn_factor", attention)
    return rope | (own or {"rope_type": "default"})


def _yarn(keys: Keys, factor: float, attention: float, original: int) -> dict[str, Any]:
    if (mix := keys.get("rope.scaling.yarn_ext_factor", 1.0)) not in (1, -1):  # -1 stands for 1
        keys.refuse("rope.scaling.yarn_ext_factor", mix)
    for key, unused in (("yarn_log_multiplier", 0), ("yarn_attn_factor", 1)):  # of which runtimes disagree
        if (value := keys.get(f"rope.scaling.{key}", unused)) != unused:
            keys.refuse(f"rope.scaling.{key}", value)
    own = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": keys.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.get("rope.scaling.yarn_beta_slow", 1.0),
    }
    if attention != 1:
        own["attention_factor"] = attention * (0.1 * math.log(factor) + 1)
    return own


def _by_length(
    long: list[float], short: list[float], attention: float, original: int, context: int
) -> dict[str, Any]:
    """Frequencies divided by other factors in windows longer than those of the first training."""
    return {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "factor": context / original,
        "attention_factor": attention,
        "original_max_position_embeddings": original,
    }


def _divided(
    factors: list[float], theta: float, turned: int, original: int | None, context: int
) -> dict[str, Any]:
    """Frequencies divided by factors: those of Llama 3 by their rule, others as they are."""
    if all(factor == 1 for factor in factors):
        return {}
    rule = LLAMA3 | {"factor": max(factors)}
    if original:
        rule["original_max_position_embeddings"] = original
    expected = _llama3_factors(rule, theta, turned)
    if all(math.isclose(*pair, rel_tol=FACTORS_MATCH) for pair in zip(expected, factors, strict=True)):
        return {"rope_type": "llama3", **rule}
    # With the same factors for all lengths, this is what any factors do.
    return _by_length(factors, factors, 1.0, context, context)


def _llama3_factors(rule: dict[str, float], theta: float, turned: int) -> list[float]:
    factors = []
    for i in range(0, turned, 2):
        turns = rule["original_max_position_embeddings"] / (2 * math.pi * theta ** (i / turned))
        low, high = rule["low_freq_factor"], rule["high_freq_factor"]
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rule["factor"] + smooth))
    return factors
