"""Ternary checkpoints in transformers: after ``import harness.hf``, ``from_pretrained`` reads them.

Linear layers become `TernaryLinear` with dense weights beside the packed ones; `use_kernels` lets a device
multiply by the packed ones, which `load` does by itself. Loading refuses a checkpoint that is damaged or
lacks a tensor; without this import transformers would only warn, and fill such layers at random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from harness.compute import dtype_name
from harness.errors import UserError
from harness.files import read_json
from harness.models.folder import CONFIG, GENERATION, read_config
from harness.models.loading import load_original
from harness.models.original import Original, quiet_transformers, require_complete
from harness.ternary.embedding import expect_codes, kept_codes, take_codes
from harness.ternary.format import QUANT_METHOD, StoredLayers, is_ternary, stored_layers
from harness.ternary.kernels.launches import use_kernels
from harness.ternary.linear import TernaryLinear
from harness.ternary.reading import load_tokenizer, verify, weight_map
from reference.packing import FORMAT_VERSION

# What weights of a model may be.
MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@register_quantization_config(QUANT_METHOD)
class TernaryQuantization(QuantizationConfigMixin):
    """The ``quantization_config`` of a ternary checkpoint.

    Parameters
    ----------
    format_version, block_size, grid, modules, unpermuted, shared_inputs, coded, weight_dtype
        As `harness.ternary.format` describes.
    dense : bool
        Whether dense weights are kept beside the packed ones; not stored.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        block_size: int = 128,
        grid: str = "float16",
        modules: list[str] | None = None,
        unpermuted: list[str] | None = None,
        shared_inputs: list[list[str]] | None = None,
        coded: list[str] | None = None,
        weight_dtype: str | None = None,
        dense: bool = True,
        **rest: Any,
    ) -> None:
        self.quant_method: Any = QUANT_METHOD  # transformers has an enum of its own methods
        self.format_version = format_version
        self.block_size = block_size
        self.grid = grid
        self.modules = modules
        self.unpermuted = unpermuted
        self.shared_inputs = shared_inputs
        self.coded = coded or []
        self.weight_dtype = weight_dtype
        self.dense = dense

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return {name: value for name, value in super().to_dict().items() if name != "dense"}


@register_quantizer(QUANT_METHOD)
class TernaryQuantizer(HfQuantizer):
    """Swaps `TernaryLinear` in before the weights are loaded."""

    quantization_config: TernaryQuantization
    requires_calibration = True  # transformers cannot ternarize; python -m harness.quantize does

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **rest: Any
    ) -> None:
        stored = stored_layers(self.quantization_config.to_dict(), "config.json")
        folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        # Weights are what calibration saw, also for a model that is loaded or was saved in another dtype.
        config = self.quantization_config
        if config.weight_dtype is None:
            own = dtype_name(model.dtype)
            config.weight_dtype = read_config(folder).get("dtype") if folder else own
        dtype = _named_dtype(config.weight_dtype)
        self.stored_dtype = dtype
        for name in stored.modules:
            swap(model, name, stored, dtype)
        for name in stored.coded:
            expect_codes(model.get_submodule(name))
        if folder:
            with torch.device("cpu"):  # transformers has made the meta device the default
                verify(folder, model)

    def _process_model_after_weight_loading(self, model: Any, **rest: Any) -> Any:
        for name in self.quantization_config.coded:
            take_codes(model.get_submodule(name), self.stored_dtype, model.dtype)
        if self.quantization_config.coded:
            model.tie_weights()
        for module in model.modules():
            if isinstance(module, TernaryLinear):
                module.keep_dense(self.quantization_config.dense)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """What is saved: codes in the place of the weights that were made of them.

        Raises
        ------
        UserError
            If dense weights of a ternary layer have been edited, which its packed tensors do not show.
        """
        for name, layer in model.named_modules():
            if not isinstance(layer, TernaryLinear) or layer.weight is None:
                continue
            if not torch.equal(layer.weight, layer.dequantize().to(layer.weight.dtype)):
                raise UserError(
                    f"the weights of {name} have been edited, which trits cannot hold: it would be lost. "
                    "Edit the original model and ternarize it again"
                )
        if not self.quantization_config.coded:
            return None, {}
        tied = getattr(model, "all_tied_weights_keys", {})
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        for name in self.quantization_config.coded:
            parts = kept_codes(model.get_submodule(name))
            state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        return state, {}

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the same tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Trits have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` and static caches work."""
        return True


def _named_dtype(name: Any) -> torch.dtype:
    dtypes = {dtype_name(dtype): dtype for dtype in MODEL_DTYPES}
    if name not in dtypes:
        raise UserError(f"config.json: dtype is {name!r}, which is none of {', '.join(dtypes)}")
    return dtypes[name]


def swap(model: nn.Module, name: str, stored: StoredLayers, dtype: torch.dtype) -> None:
    """Put a `TernaryLinear` in the place of a linear layer.

    Raises
    ------
    UserError
        If the model has no linear layer of that name.
    """
    plain = dict(model.named_modules()).get(name)
    if not isinstance(plain, nn.Linear):
        raise UserError(f"config.json: {name} is not a linear layer of {type(model).__name__}")
    parent, _, own = name.rpartition(".")
    with torch.device(plain.weight.device):
        layer = TernaryLinear(
            plain.in_features,
            plain.out_features,
            stored.block_size,
            stored.grid,
            name not in stored.unpermuted,
            plain.bias is not None,
            dtype,
        )
    layer.bias = plain.bias  # in the dtype of the model
    holder: Any = model.get_submodule(parent)
    setattr(holder, own, layer)
    # Some models initialize the weights of their projections by name, and here there are none.
    holder._is_hf_initialized = True


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dense: bool | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Read a ternary checkpoint as a transformers model.

    Parameters
    ----------
    path : str or Path
        Folder that `python -m harness.quantize` wrote.
    device : str or torch.device
        Where the model goes.
    dense : bool, optional
        Keep dense weights in the dtype of the original beside the packed ones: as fast as the original
        and 12 % larger in memory. Without them a CUDA device multiplies by the packed trits, which take a
        seventh of the memory (2.25 bits a weight in place of 16, with blocks of 128); blocks other than
        64, 128, 256, ... columns have no kernel. A CPU, and a device for such blocks, dequantizes each
        layer at every call, which is slow, in an eighth of the memory and the largest layer. Left out: on
        a CPU, but not on a device.
    trust_remote_code : bool
        Whether code that comes with the model may run.

    Returns
    -------
    transformers.PreTrainedModel
        In the dtype of the original model, in evaluation mode. Every weight is, bit for bit, what
        calibration used.

    Raises
    ------
    UserError
        If the folder is no such checkpoint, its version is another, or a tensor is missing, left
        over, of the wrong shape or type, or damaged; names the tensor. Or if there is no such device.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist" if not folder.exists() else f"{folder} is not a folder")
    quantization = read_config(folder).get("quantization_config")
    if not is_ternary(folder) or not isinstance(quantization, dict):
        raise UserError(
            f"{folder} is not a ternary checkpoint: its config.json has no quant_method {QUANT_METHOD}"
        )
    # Before transformers looks at them: its messages do not say which file is wrong.
    stored_layers(quantization, str(folder))
    weight_map(folder)
    if (folder / GENERATION).is_file():
        read_json(folder / GENERATION)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without the device
        raise UserError(f"the device {device} cannot be used: {error}") from None
    on_cpu = torch.device(device).type == "cpu"
    quiet_transformers()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config.quantization_config = {**quantization, "dense": on_cpu if dense is None else dense}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except UserError:
        raise
    except Exception as error:  # a damaged config fails in as many ways as there are models
        raise UserError(f"{folder / CONFIG} does not describe a model: {error}") from None
    model, info = loaded
    require_complete(info, str(folder))
    model.to(device)
    if not on_cpu and not dense:
        try:
            use_kernels(model, quantization.get("shared_inputs"))
        except UserError as error:
            raise UserError(f"{error}; on a CPU (--cpu), or with dense=True, no kernels are needed") from None
    return model.eval()


def open_model(
    source: str | None,
    device: str | torch.device = "cpu",
    dense: bool | None = None,
    gguf_dtype: str = "bfloat16",
    trust_remote_code: bool = False,
) -> Original:
    """A ternary checkpoint by `load`, or an original model by `harness.models.loading.load_original`.

    Raises
    ------
    UserError
        As these do; or if an original model is asked to keep no dense weights.
    """
    path = Path(source) if source else None  # an empty name is refused as it is loaded
    if path is not None and is_ternary(path):
        model = load(path, device, dense, trust_remote_code)
        return Original(model, load_tokenizer(path, trust_remote_code), str(path))
    if dense is False:
        raise UserError(f"{source or 'the embedded model'} is no ternary checkpoint; leave out --packed")
    return load_original(source, gguf_dtype, trust_remote_code)
