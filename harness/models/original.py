"""An original model in memory, and the checks that every way of loading one shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from harness.errors import UserError
from harness.models.decoder import Reader


@dataclass(frozen=True)
class Original:
    """A model as it came, and where it came from.

    `read` is there if its decoder layers are not in memory; it reads tensors from disk by their names.
    `ignored` are tensors of its files that the model has no use for, such as layers that predict further
    tokens.
    """

    model: Any
    tokenizer: Any
    name: str
    read: Reader | None = None
    ignored: tuple[str, ...] = ()


def quiet_transformers() -> Any:
    """The package transformers, imported late as that takes seconds, and without its loading bars."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def require_complete(info: dict[str, Any], source: str) -> None:
    """Refuse a load that left weights at random or ignored some."""
    for key, what in (
        ("missing_keys", "lacks"),
        ("mismatched_keys", "has the wrong shape for"),
        ("unexpected_keys", "has tensors the model does not know:"),
    ):
        names = sorted(str(k) for k in info.get(key, ()))
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise UserError(f"{source} {what} {', '.join(names[:5])}{more}")
    if info.get("error_msgs"):
        raise UserError(f"{source}: {info['error_msgs'][0]}")


def require_all_found(info: dict[str, Any], source: str) -> tuple[str, ...]:
    """Refuse a load that left weights at random; returns the tensors that it ignored.

    Those do no harm as long as nothing is missing, and some originals have them.
    """
    require_complete({**info, "unexpected_keys": ()}, source)
    return tuple(sorted(str(key) for key in info.get("unexpected_keys", ())))


def require_fits(model: Any, tokens: torch.Tensor, seqlen: int) -> None:
    """Refuse windows longer than the model has positions for, and tokens it has no embedding of."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions and seqlen > positions:
        raise UserError(f"windows of {seqlen} tokens are longer than the {positions} positions of the model")
    if tokens.numel() and int(tokens.max()) >= config.vocab_size:
        raise UserError(
            f"the tokenizer gives token {int(tokens.max())}, the model has {config.vocab_size}; "
            "they do not belong together"
        )


def summary(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
