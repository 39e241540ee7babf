"""Features of models that not every runtime computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from harness.errors import UserError
from harness.models.classes import is_classifier

Row = TypeVar("Row")

QKV_BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
ALL_BIASES = (*QKV_BIASES, "o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias")


class Refused(UserError):
    """A feature of a model that its export would lose; the message is a clause."""


def require(holds: bool, what: str) -> None:
    """Refuse a model that a runtime would compute otherwise.

    Raises
    ------
    Refused
        If it does not hold; `what` is the reason.
    """
    if not holds:
        raise Refused(what)


@contextmanager
def refusals_of(name: str | Path) -> Iterator[None]:
    """Turn the reason of a refusal into an error that names the checkpoint or the model."""
    try:
        yield
    except Refused as refused:
        raise UserError(f"{name} cannot be exported: {refused}") from None


def row_of(model: Any, table: dict[str, Row], program: str) -> Row:
    """Look up a model's architecture in the table of a program.

    Raises
    ------
    Refused
        If the table has no such architecture, the model is a classifier, or it has Python code of its own.
    """
    kind = model.config.model_type
    require(kind in table, f"{program} export does not support {kind} models, only {', '.join(table)}")
    require(not is_classifier(model), f"the classification head of {type(model).__name__} would be lost")
    code = getattr(model, "_auto_class", None)
    require(code is None, "the Python code shipped with it would be lost")
    return table[kind]


def require_activation(config: Any, activation: str) -> None:
    """Refuse another activation than the one that a runtime computes."""
    own = getattr(config, "hidden_activation", None) or config.hidden_act
    require(own == activation, f"its activation {own} would be lost")


def require_biases(tensors: list[str], biases: tuple[str, ...]) -> None:
    """Refuse biases that a runtime does not read."""
    lost = [name for name in tensors if name.endswith(".bias") and not name.endswith(biases)]
    require(not lost, f"{lost and lost[0]} would be lost")


def require_separate_experts(tensors: list[str]) -> None:
    """Refuse experts that were left as they are, which no format stores as the checkpoint does."""
    fused = [name for name in tensors if ".experts." in name]
    require(not fused, f"its experts were not ternarized ({fused and fused[0]})")


def require_experts_everywhere(config: Any, program: str) -> None:
    """Refuse layers without experts among layers with experts."""
    dense = getattr(config, "mlp_only_layers", []) or getattr(config, "decoder_sparse_step", 1) != 1
    require(not dense, f"some of its layers have no experts, which {program} expects in every layer")


def head_width(config: Any) -> int:
    """Columns of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def require_even_heads(config: Any) -> None:
    """Refuse heads that do not add up to the width of the model."""
    width = head_width(config)
    require(width * config.num_attention_heads == config.hidden_size, f"its heads are {width} wide")


def window_of(config: Any) -> int | None:
    """The sliding window of a model's attention; None if it has none, or one as long as its context."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if not window or "sliding_attention" not in kinds or window >= config.max_position_embeddings:
        return None
    return int(window)


def window_period(config: Any) -> int:
    """The n of a model whose every n-th layer attends to everything, and all others within windows.

    Raises
    ------
    Refused
        If there is no such n.
    """
    kinds = config.layer_types
    period = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    expected = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(len(kinds))]
    require(kinds == expected, "its layers have no regular pattern of sliding windows")
    return int(period)


def rotary(config: Any) -> tuple[dict[str, Any], str | None]:
    """Rotary settings of a model, where it has several of its layers with full attention.

    Returns
    -------
    dict
        The settings.
    str or None
        The kind of layers they belong to; None if all have the same.
    """
    rope = config.rope_parameters
    if "full_attention" in rope:
        return rope["full_attention"], "full_attention"
    return rope, None


def require_scaling(rope: dict[str, Any], scalings: tuple[str, ...], partial: bool) -> str:
    """Return the kind of scaling of rotary frequencies; refuse one that a runtime does not compute."""
    kind = rope.get("rope_type", "default")
    require(kind in scalings, f"its rope scaling ({kind}) would be lost")
    require(
        partial or rope.get("partial_rotary_factor") in (None, 1),
        "its partial rotary embedding would be lost",
    )
    return str(kind)
