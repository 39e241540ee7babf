"""Ternary checkpoints in transformers: after ``import harness.hf``, ``from_pretrained`` reads them.

Linear layers become `TernaryLinear`. On a CPU they multiply by packed trits. Elsewhere they hold dense
weights beside the packed ones, until `use_kernels` makes the device multiply by the packed ones too; `load`
calls it. ``model.dequantize()`` turns them into ``nn.Linear``.

Loading refuses a checkpoint that is damaged or lacks a tensor. Without this import transformers refuses
format version 2 (`harness.ternary.notice`), and loads version 1 with layers that it initializes at random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from harness.compute import dtype_name
from harness.errors import UserError
from harness.files import read_json
from harness.models.classes import auto_class
from harness.models.experts import DOWN, Experts, separated, up_name
from harness.models.folder import CONFIG, GENERATION, read_config
from harness.models.linearize import put
from harness.models.loading import load_original
from harness.models.original import Original, quiet_transformers, require_complete
from harness.models.tables import compute_tables
from harness.models.tokenizer import load_tokenizer
from harness.ternary.embedding import correct_config, expect_codes, kept_codes, take_codes
from harness.ternary.format import QUANT_METHOD, StoredLayers, is_ternary, named_dtype, stored_layers
from harness.ternary.kernels.launches import use_kernels
from harness.ternary.kernels.together import together
from harness.ternary.linear import TernaryLinear
from harness.ternary.notice import add_notice, drop_notice, read_past_notices
from harness.ternary.reading import verify, weight_map
from reference.packing import FORMAT_VERSION

read_past_notices()


@register_quantization_config(QUANT_METHOD)
class TernaryQuantization(QuantizationConfigMixin):
    """The ``quantization_config`` of a ternary checkpoint.

    Parameters
    ----------
    format_version, block_size, grid, symmetric, modules, unpermuted, shared_inputs, coded, weight_dtype
        As `harness.ternary.format` describes.
    dense : bool, optional
        Whether to keep dense weights beside the packed ones. False: the layers hold only what is stored, and
        dequantize at every call. By default, layers on a CPU multiply by packed trits, and others keep dense
        weights. This is not stored.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        block_size: int = 128,
        grid: str = "float16",
        symmetric: bool = False,
        modules: list[str] | None = None,
        unpermuted: list[str] | None = None,
        shared_inputs: list[list[str]] | None = None,
        coded: list[str] | None = None,
        weight_dtype: str | None = None,
        dense: bool | None = None,
        **rest: Any,
    ) -> None:
        self.quant_method: Any = QUANT_METHOD  # transformers has an enum of its own methods
        self.format_version = format_version
        self.block_size = block_size
        self.grid = grid
        self.symmetric = symmetric
        self.modules = modules
        self.unpermuted = unpermuted
        self.shared_inputs = shared_inputs
        self.coded = coded or []
        self.weight_dtype = weight_dtype
        self.dense = dense

    def to_dict(self) -> dict[str, Any]:
        """Return the object stored in config.json."""
        return {name: value for name, value in super().to_dict().items() if name != "dense"}


@register_quantizer(QUANT_METHOD)
class TernaryQuantizer(HfQuantizer):
    """Replaces linear layers by `TernaryLinear` before the weights are loaded."""

    quantization_config: TernaryQuantization
    requires_calibration = True  # transformers cannot ternarize; python -m harness.quantize does

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **rest: Any
    ) -> None:
        _require_class(model)
        stored = stored_layers(self.quantization_config.to_dict(), "config.json")
        files = [Path(file) for file in checkpoint_files or ()]
        # Weights equal those that calibration used, even if the model is loaded or saved in another dtype.
        config = self.quantization_config
        if config.weight_dtype is None:
            loaded = dtype_name(model.dtype)
            config.weight_dtype = read_config(files[0].parent).get("dtype") if files else loaded
        dtype = named_dtype(config.weight_dtype)
        self.stored_dtype = dtype
        _separate_experts(model, stored.modules)
        for name in stored.modules:
            swap(model, name, stored, dtype)
            # The `_init_weights` of a model fills tables that no file holds, and may initialize weights by
            # name, those of fused experts too: until all tensors are loaded, it finds here one that takes no
            # memory.
            layer = model.get_submodule(name)
            vars(layer)["weight"] = torch.empty(layer.out_features, layer.in_features, device="meta")
        for name in stored.coded:
            expect_codes(model.get_submodule(name))
        # A head with codes of its own is not tied, whatever the config of an early checkpoint says.
        own = {f"{name}.weight" for name in stored.coded}
        for name, source in list(model.all_tied_weights_keys.items()):
            if {name, source} <= own:
                del model.all_tied_weights_keys[name]
        if files:
            with torch.device("cpu"):  # transformers has made the meta device the default
                verify(files, model)

    def _process_model_after_weight_loading(self, model: Any, **rest: Any) -> Any:
        for name in self.quantization_config.coded:
            take_codes(model.get_submodule(name), self.stored_dtype, model.dtype)
        if self.quantization_config.coded:
            model.tie_weights(recompute_mapping=False)
        correct_config(model)
        self.quantization_config.format_version = FORMAT_VERSION  # in which the model is saved
        add_notice(model.config)
        compute_tables(model)
        layers = [module for module in model.modules() if isinstance(module, TernaryLinear)]
        on_host = all(layer.device.type == "cpu" for layer in layers)
        dense = self.quantization_config.dense
        for module in model.modules():  # drop what stood in for weights while tensors were loaded
            if isinstance(module, Experts):
                for part in (up_name(module), DOWN):
                    module.__dict__.pop(part, None)
        for layer in layers:
            layer.__dict__.pop("weight", None)
            layer.keep_dense(not on_host if dense is None else dense)
        if dense is None and on_host:
            use_kernels(model)
        return model

    def update_weight_conversions(self, *arguments: Any, **rest: Any) -> list[Any]:
        """Return no conversions: a checkpoint has the names that the model has in memory, not the hub's."""
        return []

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Return the tensors to save: codes instead of the weights that were decoded from them.

        Raises
        ------
        UserError
            If dense weights of a ternary layer were edited, because its packed tensors lack the edit.
        """
        for name, layer in model.named_modules():
            if not isinstance(layer, TernaryLinear) or layer.dense is None:
                continue
            if not torch.equal(layer.dense, layer.dequantize().to(layer.dense.dtype)):
                raise UserError(
                    f"the weights of {name} were edited; trits cannot hold the edit, and saving loses it. "
                    "Edit the original model and ternarize it again"
                )
        correct_config(model)
        if not self.quantization_config.coded:
            return None, {}
        state = model.state_dict()
        for name in self.quantization_config.coded:
            module = model.get_submodule(name)
            tied = module.weight.data_ptr()
            state = {other: tensor for other, tensor in state.items() if tensor.data_ptr() != tied}
            state |= {f"{name}.{part}": tensor for part, tensor in kept_codes(module).items()}
        return state, {}

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Turn a ternary model into a plain one, in place; in its own dtype by default."""
        drop_notice(model.config)
        return super().dequantize(model, model.dtype if dtype is None else dtype)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, TernaryLinear):
                put(model, name, layer.plain())
        for name, module in list(model.named_modules()):
            if isinstance(module, Experts):
                put(model, name, module.fuse())
        for name in self.quantization_config.coded:
            module = model.get_submodule(name)
            module.weight.requires_grad_(True)
            if hasattr(module, "row_factor_bits"):
                del module.row_factor_bits
        for parameter in model.parameters():  # tables that the model computes stay as exact as they are
            parameter.data = parameter.data.to(dtype)
        return model

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


def _require_class(model: Any) -> None:
    """Refuse to load a checkpoint into a model of another class, such as the body alone."""
    classes = model.config.architectures
    if classes and not any(kind.__name__ in classes for kind in type(model).__mro__):
        auto = auto_class(model.config, model.name_or_path).__name__
        raise UserError(
            f"the checkpoint is for {classes[0]} (load it by {auto}), not for "
            f"{type(model).__name__}; that can be loaded from the plain model that "
            "dequantize() and save_pretrained() of the loaded model write"
        )


def _separate_experts(model: nn.Module, names: list[str]) -> None:
    """Give the experts of a model matrices of their own, where these names ask for it."""
    inside = {name.rsplit(".", 2)[0] for name in names if name.count(".") > 1}
    for name, module in list(model.named_modules()):
        if name in inside and (kind := separated(module)):
            experts = kind(module, together)
            for part in (up_name(module), DOWN):
                experts.__dict__[part] = torch.empty(0, device="meta")
            put(model, name, experts)


def swap(model: nn.Module, name: str, stored: StoredLayers, dtype: torch.dtype) -> None:
    """Replace a linear layer by a `TernaryLinear`.

    Raises
    ------
    UserError
        If the model has no linear layer of that name.
    """
    plain = dict(model.named_modules()).get(name)
    if not isinstance(plain, nn.Linear | Conv1D):
        raise UserError(f"config.json: {name} is not a linear layer of {type(model).__name__}")
    transposed = isinstance(plain, Conv1D)
    rows, columns = plain.weight.T.shape if transposed else plain.weight.shape
    with torch.device(plain.weight.device):
        layer = TernaryLinear(
            columns,
            rows,
            stored.block_size,
            stored.grid,
            name not in stored.unpermuted,
            plain.bias is not None,
            dtype,
            stored.symmetric,
            transposed,
        )
    layer.bias = plain.bias  # in the dtype of the model
    put(model, name, layer)


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dense: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Read a ternary checkpoint as a transformers model.

    Parameters
    ----------
    path : str or Path
        Folder that `python -m harness.quantize` wrote.
    device : str or torch.device
        Where to put the model.
    dense : bool
        Keep dense weights in the dtype of the original beside the packed ones: as fast as the original
        and 12 % larger in memory. Without them a CPU multiplies by the packed trits, which take little more
        memory than their file, with float32 sums; so does a CUDA device, at 2.25 bits per weight with
        blocks of 128. Blocks other than 64, 128, 256, ... columns have no kernel on a CUDA device, which
        dequantizes each such layer at every call: this is slow.
    trust_remote_code : bool
        Whether code that comes with the model may run.

    Returns
    -------
    transformers.PreTrainedModel
        In the dtype of the original model, in evaluation mode. Dense weights are bit-identical to those that
        calibration used; products of packed trits leave out their rounding to the dtype of the original.

    Raises
    ------
    UserError
        If the folder is not a ternary checkpoint, has another format version, or a tensor is missing,
        unexpected, damaged, or of the wrong shape or type (the message names the tensor); or if the
        device cannot be used.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError if torch is built without the device
        raise UserError(f"the device {device} cannot be used: {error}") from None
    model = load_stored(path, dense, trust_remote_code).to(device)
    if not dense:
        try:
            use_kernels(model)
        except UserError as error:
            raise UserError(f"{error}; a CPU (--cpu) or dense=True needs no kernels") from None
    return model


def load_stored(path: str | Path, dense: bool = False, trust_remote_code: bool = False) -> Any:
    """Read a ternary checkpoint on the host, its layers with the tensors as stored.

    Parameters
    ----------
    path, trust_remote_code
        As for `load`.
    dense : bool
        Whether the layers keep dense weights beside them, and multiply by those.

    Returns
    -------
    transformers.PreTrainedModel

    Raises
    ------
    UserError
        As `load` does.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist" if not folder.exists() else f"{folder} is not a folder")
    quantization = read_config(folder).get("quantization_config")
    if not is_ternary(folder) or not isinstance(quantization, dict):
        raise UserError(
            f"{folder} is not a ternary checkpoint: its config.json has no quant_method {QUANT_METHOD}"
        )
    # Check before transformers does: its messages do not name the faulty file.
    stored_layers(quantization, str(folder))
    weight_map(folder)
    if (folder / GENERATION).is_file():
        read_json(folder / GENERATION)
    quiet_transformers()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config.quantization_config = {**quantization, "dense": dense}
        loaded: Any = auto_class(config, str(folder)).from_pretrained(
            folder,
            config=config,
            dtype="auto",
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except UserError:
        raise
    except Exception as error:  # models fail in many ways on a damaged config
        raise UserError(f"{folder / CONFIG} does not describe a model: {error}") from None
    model, info = loaded
    require_complete(info, str(folder))
    return model.eval()


def open_model(
    source: str | None,
    device: str | torch.device = "cpu",
    dense: bool | None = None,
    gguf_dtype: str = "bfloat16",
    trust_remote_code: bool = False,
) -> Original:
    """Open a ternary checkpoint by `load`, or an original model by `harness.models.loading.load_original`.

    Raises
    ------
    UserError
        As those functions do; or if `dense` is false for an original model.
    """
    path = Path(source) if source else None  # `load_original` refuses an empty name
    if path is not None and is_ternary(path):
        tokenizer = load_tokenizer(path, trust_remote_code)
        return Original(load(path, device, bool(dense), trust_remote_code), tokenizer, str(path))
    if dense is False:
        raise UserError(f"{source or 'the embedded model'} is not a ternary checkpoint; drop --packed")
    return load_original(source, gguf_dtype, trust_remote_code)
