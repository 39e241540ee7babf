"""The ``quantization_config`` of a ternary checkpoint in vLLM: which layer is loaded how.

Importing this module must not import Numba: after vLLM has called its plugins, it looks, on a CPU, into all
modules that are loaded, and fails at llvmlite's (findings/vllm_cpu_llvmlite.sh).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from harness.errors import UserError
from harness.ternary.format import QUANT_METHOD, StoredLayers, named_dtype, stored_layers


@register_quantization_config(QUANT_METHOD)
class TernaryQuantization(QuantizationConfig):
    """A checkpoint's configuration.

    Parameters
    ----------
    stored : StoredLayers
        As config.json has it; vLLM may rename the layers in it.
    weight_dtype : torch.dtype or None
        dtype that dequantized weights are rounded to. None in the first checkpoints: the dtype of the model.
    """

    def __init__(self, stored: StoredLayers, weight_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.stored, self.weight_dtype = stored, weight_dtype
        self._unchecked: Path | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TernaryQuantization:
        """Read the object of config.json."""
        dtype = config.get("weight_dtype")
        return cls(stored_layers(config, "config.json"), None if dtype is None else named_dtype(dtype))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Take what the ``quantization_config`` lacks from the rest of config.json, and note the folder."""
        self._unchecked = Path(model_name)
        if self.weight_dtype is None:
            self.weight_dtype = hf_config.dtype

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers as vLLM's model does."""
        lists = {name: getattr(self.stored, name) for name in ("modules", "unpermuted", "coded")}
        renamed = {name: hf_to_vllm_mapper.apply_list(names) for name, names in lists.items()}
        self.stored = replace(self.stored, **renamed)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Choose how a layer of this name is loaded; None for vLLM's default.

        Raises
        ------
        UserError
            If a file of the checkpoint is missing or damaged, or if vLLM merges packed layers with others or
            has experts in place of them.
        """
        from harness.vllm.embedding import CodedEmbeddingMethod
        from harness.vllm.linear import TernaryLinearMethod

        self._require_files()
        assert self.weight_dtype is not None  # vLLM has called `maybe_update_config`
        stored = self.stored
        if isinstance(layer, LinearBase):
            parent, dot, own = prefix.rpartition(".")
            names = [parent + dot + name for name in self.packed_modules_mapping.get(own, [own])]
            packed = [name for name in names if name in stored.modules]
            if not packed:
                return UnquantizedLinearMethod()
            if packed != names:
                others = ", ".join(name for name in names if name not in packed)
                raise UserError(
                    f"vLLM merges {', '.join(packed)} with {others}, which the checkpoint does not pack"
                )
            return TernaryLinearMethod(names, stored, self.weight_dtype)
        if isinstance(layer, VocabParallelEmbedding):
            # Some models give the input embedding no name. It is in 8 bits if anything is.
            unnamed = not prefix and not isinstance(layer, ParallelLMHead)
            if stored.coded and (unnamed or prefix in stored.coded):
                return CodedEmbeddingMethod(prefix or stored.coded[0], self.weight_dtype)
            return None
        if any(name.startswith(f"{prefix}.") for name in stored.modules):
            raise UserError(
                f"vLLM has a {type(layer).__name__} at {prefix}; packed layers in it are not supported"
            )
        return None

    def _require_files(self) -> None:
        """Check, once, that a folder has all files of the checkpoint: vLLM reads those that it finds."""
        from harness.ternary.reading import weight_map

        if self._unchecked is not None and self._unchecked.is_dir():
            weight_map(self._unchecked)
        self._unchecked = None

    def get_name(self) -> Any:
        """Name of the format."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that vLLM has."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere: tests compile the kernels for it and later devices."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all is in config.json."""
        return []
