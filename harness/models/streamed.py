"""Load models larger than memory: their decoder layers stay on disk and are read one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from harness.compute import HOST
from harness.errors import UserError
from harness.machine import host_memory
from harness.models.classes import auto_class
from harness.models.conversion import Conversion
from harness.models.decoder import DecoderLayers, Reader, locate_layers
from harness.models.folder import INDEX, SINGLE, files_of_tensors
from harness.models.original import Original, quiet_transformers, require_all_found
from harness.models.tables import compute_tables
from harness.models.tokenizer import load_tokenizer, read_processor

# Share of the memory that weights may take; the rest is for hidden states and working memory.
MEMORY_SHARE = 0.6


def is_larger_than_memory(folder: Path) -> bool:
    """Whether the weights of a model folder take more than `MEMORY_SHARE` of this machine's memory."""
    if not any((folder / name).is_file() for name in (INDEX, SINGLE)):
        return False  # without safetensors files, tensors cannot be read one at a time
    files = [folder / name for name in set(files_of_tensors(folder).values())]
    return sum(file.stat().st_size for file in files if file.exists()) > MEMORY_SHARE * host_memory()


def load_streamed(folder: Path, trust_remote_code: bool = False) -> Original:
    """Load a model without the weights of its decoder layers.

    Parameters
    ----------
    folder : Path
        A model folder with safetensors files.
    trust_remote_code : bool
        Whether Python code shipped with the model may run.

    Returns
    -------
    Original
        Its ``read`` reads the weights of the layers from the files.

    Raises
    ------
    UserError
        If the files lack a tensor of the model.
    """
    transformers = quiet_transformers()

    options = {"trust_remote_code": trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    auto = auto_class(config, str(folder))
    tokenizer = load_tokenizer(folder, trust_remote_code)
    depth = config.get_text_config().num_hidden_layers
    config.get_text_config().num_hidden_layers = 1
    model, info = auto.from_pretrained(
        folder, config=config, dtype="auto", output_loading_info=True, **options
    )
    decoder = attach_empty_layers(model, depth, trust_remote_code)
    files = files_of_tensors(folder)
    expected = {f"{decoder.prefix}.{name}" for name in decoder.layers.state_dict()}
    conversion = Conversion(model, files)
    conversion.require(expected, folder)
    info["unexpected_keys"] = set(info["unexpected_keys"]) - expected
    ignored = require_all_found(info, str(folder))
    read = conversion.reader(_reader(folder, files))
    return Original(model.eval(), tokenizer, str(folder), read, ignored, read_processor(folder))


def attach_empty_layers(model: Any, depth: int, trust_remote_code: bool = False) -> DecoderLayers:
    """Replace a model's decoder layers with `depth` layers on torch's meta device, without weights.

    Non-persistent buffers (causal masks, position tables) are in no file; they are computed.
    """
    prefix = locate_layers(model).prefix
    model.config.get_text_config().num_hidden_layers = depth
    with torch.device("meta"):
        shapes = auto_class(model.config, model.name_or_path).from_config(
            model.config, dtype=model.dtype, trust_remote_code=trust_remote_code
        )
    layers = shapes.get_submodule(prefix).eval()
    _compute_buffers(shapes, layers)
    parent, _, name = prefix.rpartition(".")
    setattr(model.get_submodule(parent), name, layers)
    compute_tables(model)
    return locate_layers(model)


def _compute_buffers(model: Any, layers: Any) -> None:
    """Fill the non-persistent buffers of layers on the meta device, as ``from_pretrained`` would."""
    stored = layers.state_dict()
    for name, buffer in [(name, buffer) for name, buffer in layers.named_buffers() if name not in stored]:
        owner, _, own = name.rpartition(".")
        empty = torch.empty_like(buffer, device=HOST)
        layers.get_submodule(owner).register_buffer(own, empty, persistent=False)
    for module in layers.modules():
        module._is_hf_initialized = False
    model.initialize_weights()


def _reader(folder: Path, files: dict[str, str]) -> Reader:
    """Read tensors by name, and refuse a file that is no longer the one of the first tensors."""

    def state(file: str) -> tuple[int, int, int]:
        found = (folder / file).stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    began = {file: state(file) for file in set(files.values())}

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        tensors = {}
        for file in sorted({files[name] for name in names}):
            if state(file) != began[file]:
                raise UserError(
                    f"{folder / file} has changed while the model was in use; put it back, or begin again"
                )
            with safe_open(folder / file, framework="pt") as shard:
                tensors.update({name: shard.get_tensor(name) for name in names if files[name] == file})
        return tensors

    return read
