"""An embedding or LM head in 8 bits in vLLM: dense in memory, as in `harness.ternary.embedding`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.utils import set_weight_attrs

from harness.errors import UserError
from harness.ternary.embedding import decode
from harness.ternary.reading import require_packed


class CodedEmbeddingMethod(UnquantizedEmbeddingMethod):
    """How vLLM loads an embedding or LM head from codes.

    Parameters
    ----------
    name : str
        Its name in the checkpoint.
    weight_dtype : torch.dtype
        dtype that decoded weights are rounded to.
    """

    def __init__(self, name: str, weight_dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.weight_dtype = name, weight_dtype

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """Register the dense weight, and a parameter that the row factors are loaded into."""
        of_vllm = attributes.pop("weight_loader")
        layer.codes = {}
        super().create_weights(layer, *sizes, **attributes)
        row_factor = nn.Parameter(torch.empty(0, dtype=torch.float32), requires_grad=False)
        layer.register_parameter("row_factor", row_factor)
        for part in ("weight", "row_factor"):
            load = partial(self._load, layer, part, of_vllm)
            set_weight_attrs(getattr(layer, part), {"weight_loader": load})

    def _load(self, layer: Any, part: str, of_vllm: Any, parameter: Any, tensor: torch.Tensor) -> None:
        rows, columns = layer.org_vocab_size, layer.embedding_dim
        shape, kind = ((rows, columns), torch.int8) if part == "weight" else ((rows,), torch.float32)
        expected = torch.empty(shape, dtype=kind, device="meta")
        with torch.device("cpu"):  # where the tensor is, whatever vLLM has made the default
            require_packed(f"{self.name}.{part}", part, tensor, expected, columns)
        layer.codes[part] = tensor
        if len(layer.codes) == 2:
            of_vllm(layer.weight, decode(**layer.codes, dtype=self.weight_dtype))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that the codes were loaded.

        Raises
        ------
        UserError
            If a tensor is missing.
        """
        for part in ("weight", "row_factor"):
            if part not in layer.codes:
                raise UserError(f"the tensor {self.name}.{part} is missing")
        del layer.codes, layer.row_factor
        super().process_weights_after_loading(layer)
