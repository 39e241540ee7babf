"""Fold the order of a matrix's columns into the rows of the matrices that make its input.

Formats of neighbouring columns have no place for an order. Two orders can be moved to where they cost
nothing:

down_proj  reads gate(x) * up(x), element by element: its columns may have any order if the rows of gate_proj
           and up_proj have the same.
o_proj     reads the heads' mixtures of values: columns may be reordered within each head, as the rows of
           v_proj; heads that share a value head must have the same order.

All other matrices read the residual stream, which all layers share and whose order no matrix can have alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.runtimes.containers import FOLDABLE, FOLDABLE_MODELS
from harness.runtimes.features import head_width, require
from harness.ternary.linear import TernaryLinear

Order = NDArray[np.intp]

UNFOLDABLE = (
    "this format has groups of neighbouring columns, and only the orders of down_proj, and of o_proj within "
    "heads, can be moved into other matrices; quantize with --reorder none, or --foldable"
)


def fold(layers: Mapping[str, TernaryLinear], config: Any) -> dict[str, Order]:
    """Find the orders of rows that make up for the orders of columns.

    Parameters
    ----------
    layers : mapping of str to TernaryLinear
        The ternary layers.
    config : transformers.PreTrainedConfig
        Config of the model.

    Returns
    -------
    dict of (n,) intp array
        For each matrix that must be reordered, the old row in the place of every row. With these, all
        columns stay in the order in which they were quantized.

    Raises
    ------
    Refused
        If an order cannot be folded.
    """
    rows: dict[str, Order] = {}
    for name, layer in layers.items():
        permutation = layer.stored().get("permutation")
        if permutation is None:
            continue
        parent, _, own = name.rpartition(".")
        order = permutation.numpy().astype(np.intp)
        foldable = own in (FOLDABLE, "o_proj") and config.model_type in FOLDABLE_MODELS
        require(foldable, f"the columns of {name} were reordered: {UNFOLDABLE}")
        if own == FOLDABLE:
            halves = [order, order + len(order)]
            found = {"gate_up_proj": np.concatenate(halves), "gate_proj": order, "up_proj": order}
        else:
            values = _value_rows(order, config, name)
            before = (config.num_attention_heads + config.num_key_value_heads) * head_width(config)
            found = {"qkv_proj": np.concatenate([np.arange(before), before + values]), "v_proj": values}
        rows |= {f"{parent}.{part}": order for part, order in found.items() if f"{parent}.{part}" in layers}
    return rows


def _value_rows(order: Order, config: Any, name: str) -> Order:
    """The order of v_proj's rows for an order of o_proj's columns."""
    width, groups = head_width(config), config.num_key_value_heads
    heads = order.reshape(groups, -1, width)  # heads that share a value head stand together
    inside = heads - np.arange(0, len(order), width).reshape(groups, -1, 1)
    require(
        bool(((inside >= 0) & (inside < width)).all()),
        f"the order of {name} moves columns from one head to another: {UNFOLDABLE}",
    )
    require(
        bool((inside == inside[:, :1]).all()),
        f"the order of {name} differs between heads that share their values: {UNFOLDABLE}",
    )
    return (inside[:, 0] + np.arange(0, groups * width, width)[:, None]).reshape(-1)
