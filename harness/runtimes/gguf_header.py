"""What a GGUF file says of a model beside its tensors: settings, rotary embeddings, tokenizer.

Whatever llama.cpp would compute otherwise is refused here, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch

from harness.runtimes.features import require, require_biases, require_separate_experts, row_of
from harness.runtimes.gguf_architectures import ARCHITECTURES, Architecture, add_settings
from harness.runtimes.gguf_rope import Factors, add_rope
from harness.runtimes.gguf_tokenizer import add_tokenizer

_PLAIN = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# Of matrices in 16 bits llama.cpp rounds the inputs to 16 bits too, which may choose other experts.
_IN_FLOAT32 = (".mlp.gate.weight", ".shared_expert_gate.weight")


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes
    ----------
    writer : gguf.GGUFWriter
        Holds the keys, and writes nothing by itself.
    architecture : Architecture
        The row of the table.
    names : gguf.TensorNameMap
        Names in GGUF of the architecture's tensors.
    factors : dict of float32 arrays
        Tensors that belong to the rotary embeddings.
    notes : list of str
        What differs from the model, to be printed.
    """

    writer: gguf.GGUFWriter
    architecture: Architecture
    names: gguf.TensorNameMap
    factors: Factors
    notes: list[str]

    def name_of(self, name: str) -> str:
        """Return the name of a tensor in GGUF; refuse one that has none."""
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        require(found is not None, f"GGUF has no name for the tensor {name}")
        return str(found)


def describe(model: Any, tokenizer: Any, tensors: Mapping[str, torch.Tensor]) -> Header:
    """Describe a model as GGUF does.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model, ternary or original.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer.
    tensors : mapping of str to torch.Tensor
        Its tensors that are not ternary; their data are not read.

    Raises
    ------
    Refused
        If llama.cpp would compute something else than the model, or GGUF has no place for a part of it.
    """
    architecture, config = row_of(model, ARCHITECTURES, "GGUF"), model.config
    require_biases([*tensors], architecture.biases)
    require_separate_experts([*tensors])
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        require(tensor.dtype in _PLAIN, f"{name} is {kind}, which GGUF does not support")
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture.arch])
    notes = add_settings(writer, architecture, config)
    factors = add_rope(writer, architecture, config)
    names = gguf.get_tensor_name_map(architecture.arch, config.num_hidden_layers)
    header = Header(writer, architecture, names, factors, notes)
    for name in tensors:
        header.name_of(name)
    add_tokenizer(writer, tokenizer, config)
    return header


def plain_type(name: str, tensor: torch.Tensor) -> str:
    """Type in GGUF of a tensor that is stored as it is."""
    return "F32" if tensor.ndim == 1 or name.endswith(_IN_FLOAT32) else _PLAIN[tensor.dtype]
