"""Tensors of a model that no file holds: masks, tables of positions, factors."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights


@torch.no_grad()
def compute_tables(model: Any) -> None:
    """Compute the non-persistent buffers of a loaded model whose code comes with it.

    ``from_pretrained`` fills them by `_init_weights` and leaves others uninitialized. All models of
    transformers have such an `_init_weights`; code written for earlier versions fills buffers in `__init__`.
    """
    if type(model).__module__.startswith("transformers."):
        return
    with init_empty_weights(include_buffers=False):
        fresh = type(model)(model.config)
    stored, loaded = fresh.state_dict(), dict(model.named_buffers())
    for name, table in fresh.named_buffers():
        if name in loaded and name not in stored and not table.is_meta:
            loaded[name].copy_(table)
