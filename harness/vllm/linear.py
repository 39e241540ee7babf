"""A ternary linear layer in vLLM: packed weights on a CUDA device and on a CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from harness.ternary.format import PACKED, StoredLayers
from harness.ternary.kernels.launches import use_kernels
from harness.vllm.shards import BY_ROWS, LEAST_WIDTH, LayerShards, Shard, product
from reference.layout import LEAST_BLOCK


class TernaryLinearMethod(LinearMethodBase):
    """How vLLM loads a linear layer and multiplies by it.

    Parameters
    ----------
    names : list of str
        The matrices of the checkpoint that the layer merges.
    stored : StoredLayers
        The checkpoint's configuration.
    weight_dtype : torch.dtype
        dtype that dequantized weights are rounded to.
    """

    def __init__(self, names: list[str], stored: StoredLayers, weight_dtype: torch.dtype) -> None:
        self.names, self.stored, self.weight_dtype = names, stored, weight_dtype

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Register a parameter for every stored part of the layer's matrices."""
        first = layer.tp_rank * input_size_per_partition if input_size_per_partition < input_size else 0
        inputs = range(first, first + input_size_per_partition)
        layer.shards = LayerShards(
            self.names, self.stored, output_partition_sizes, layer.tp_size, input_size, inputs
        )
        for part, tensor in layer.shards.parameters().items():
            parameter = nn.Parameter(tensor, requires_grad=False)
            load = partial(_load, layer.shards, part, attributes["weight_loader"])
            set_weight_attrs(parameter, {"weight_loader": load})
            if part in BY_ROWS:
                set_weight_attrs(parameter, {"output_dim": 0})
            layer.register_parameter(part, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Lay out this rank's weights for the kernels, in place of the loaded parameters."""
        loaded = {name: getattr(layer, name).data for name in PACKED if hasattr(layer, name)}
        on_cpu = loaded["trits"].device.type == "cpu"
        parts = layer.shards.layers(loaded, self.weight_dtype, LEAST_WIDTH if on_cpu else LEAST_BLOCK)
        for part in loaded:
            delattr(layer, part)
        del layer.shards
        layer.ternary = nn.ModuleList(parts)
        use_kernels(layer.ternary, [[str(number) for number in range(len(parts))]])
        for part in parts:
            if part.packed is None:  # the kernels of a CUDA device do not know this block size
                part.keep_dense(True)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the outputs of the layer on this rank."""
        y = product(layer.ternary, x)
        return y if bias is None else y + bias


def _load(
    shards: LayerShards, part: str, of_vllm: Any, parameter: Any, tensor: torch.Tensor, shard: Shard = None
) -> None:
    chosen = () if shard is None else (shard,)  # loaders of layers that merge nothing take no shard
    shards.load(part, tensor, shard, partial(of_vllm, parameter, tensor, *chosen))
