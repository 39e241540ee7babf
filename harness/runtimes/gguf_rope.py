"""Write rotary embeddings as keys and tensors of GGUF.

Where llama.cpp computes the same frequencies from the settings of a scaling, these are written; else the
factors that divide the frequencies, as transformers' own functions give them.
"""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from harness.runtimes.features import head_width, require, require_scaling, rotary
from harness.runtimes.gguf_architectures import Architecture

Factors = dict[str, NDArray[np.float32]]


def add_rope(writer: gguf.GGUFWriter, architecture: Architecture, config: Any) -> Factors:
    """Write the keys of the rotary embeddings.

    Returns
    -------
    dict of float32 arrays
        Tensors to be written beside them: factors that divide the frequencies.

    Raises
    ------
    Refused
        If llama.cpp does not scale frequencies as the model does.
    """
    rope, layer_type = rotary(config)
    kind = require_scaling(rope, architecture.scalings, architecture.partial)
    turned = int(head_width(config) * (rope.get("partial_rotary_factor") or 1))
    writer.add_rope_dimension_count(turned)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "default":
        return {}
    scaled, attention = ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"), layer_type=layer_type)
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "llama3":
        plain = 1.0 / rope["rope_theta"] ** (np.arange(0, turned, 2) / turned)
        return {"rope_freqs": (plain / scaled.numpy()).astype(np.float32)}
    if kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(attention)
        return {
            f"rope_factors_{name}": np.asarray(rope[f"{name}_factor"], dtype=np.float32)
            for name in ("long", "short")
        }
    factor = rope["factor"]
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(factor)
    if kind == "yarn":
        # llama.cpp computes with these, whatever the keys for the two betas say.
        bounds = (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1, rope.get("truncate", True))
        require(bounds == (32, 1, True), "the bounds of its yarn scaling would be lost")
        writer.add_rope_scaling_orig_ctx_len(original)
        # llama.cpp multiplies by the logarithm itself.
        writer.add_rope_scaling_attn_factors(attention / (0.1 * math.log(factor) + 1))
    return {}
