"""An original model, and the checks shared by all loaders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from harness.errors import UserError
from harness.models.decoder import Reader


@dataclass(frozen=True)
class Original:
    """A model before quantization, with its tokenizer and source.

    If the decoder layers are not in memory, `read` reads their tensors from disk by name. `ignored` names
    the tensors in its files that the model does not use, such as layers for multi-token prediction.
    `processor` holds the files, by their names, that AutoProcessor reads beside those of the tokenizer.
    """

    model: Any
    tokenizer: Any
    name: str
    read: Reader | None = None
    ignored: tuple[str, ...] = ()
    processor: dict[str, bytes] = field(default_factory=dict)


def quiet_transformers() -> Any:
    """Import transformers (late, as it takes seconds), without progress bars unless its log is verbose."""
    import transformers

    if not is_verbose():
        transformers.utils.logging.disable_progress_bar()
    return transformers


def is_verbose() -> bool:
    """Whether the log level of transformers asks for more than warnings."""
    import transformers

    return transformers.logging.get_verbosity() <= transformers.logging.INFO


def require_complete(info: dict[str, Any], source: str) -> None:
    """Refuse a model with randomly initialized weights or ignored tensors.

    Parameters
    ----------
    info : dict
        Loading info of ``from_pretrained``.
    source : str
        Name of the model, for messages.
    """
    for key, what in (
        ("missing_keys", "lacks the tensors"),
        ("mismatched_keys", "has tensors of the wrong shape:"),
        ("unexpected_keys", "has tensors that the model does not have:"),
    ):
        names = sorted(str(k) for k in info.get(key, ()))
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise UserError(f"{source} {what} {', '.join(names[:5])}{more}")
    if info.get("error_msgs"):
        raise UserError(f"{source}: {info['error_msgs'][0]}")


def require_all_found(info: dict[str, Any], source: str) -> tuple[str, ...]:
    """Refuse a model with randomly initialized weights; return the names of ignored tensors.

    Some originals have such tensors; they are harmless as long as nothing is missing.
    """
    require_complete({**info, "unexpected_keys": ()}, source)
    return tuple(sorted(str(key) for key in info.get("unexpected_keys", ())))


def require_fits(model: Any, tokens: torch.Tensor, seqlen: int) -> None:
    """Refuse windows longer than the model's context, and tokens outside its vocabulary."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions and 0 < positions < seqlen:  # XLNet has -1: any number
        raise UserError(
            f"windows of {seqlen} tokens are longer than the {positions} positions of the model; "
            "use shorter windows"
        )
    if tokens.numel() and int(tokens.max()) >= config.vocab_size:
        raise UserError(
            f"the tokenizer produced token {int(tokens.max())}, but the model has only "
            f"{config.vocab_size} tokens; use the tokenizer that belongs to the model"
        )


def summary(error: Exception) -> str:
    """Format the type and message of an error in one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
