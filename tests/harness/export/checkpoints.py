"""Checkpoints to export: random ternary models, tokenizers, and a reading of the checkpoint's bytes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import dynamic_module_utils

from harness.backends import load_backend
from harness.models.decoder import locate_layers
from harness.models.linearize import linearize
from harness.models.original import Original
from harness.ternary.writing import CheckpointWriter
from reference.types import TernaryConfig, TernaryMatrix
from tests.harness import tiny

Run = Callable[..., int]

# Rows of 160 weights end in half a block of 64, which is one group of Q4_1.
SIZES = {
    "vocab_size": 400,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ROPE = {"rope_type": "default", "rope_theta": 5e4}

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

TEXT = "They're here in 1984, naïve  foxes\n\n  jump: 🙂 <s> it's 3.14!</s>"

SPECIAL = ["<pad>", "<s>", "</s>"]


def config_of(kind: str) -> Any:
    """The models that can be exported, all with several heads to a key."""
    shared = {**SIZES, "rope_parameters": ROPE}
    return {
        "tied": lambda: transformers.LlamaConfig(**shared, tie_word_embeddings=True),
        "untied": lambda: transformers.LlamaConfig(**shared),
        "wide heads": lambda: transformers.LlamaConfig(**shared, head_dim=64),
        "mistral": lambda: transformers.MistralConfig(**shared, sliding_window=None),
        "qwen2": lambda: transformers.Qwen2Config(**shared),
        "qwen3": lambda: transformers.Qwen3Config(**shared, head_dim=128, tie_word_embeddings=True),
    }[kind]()


KINDS = ("tied", "untied", "wide heads", "mistral", "qwen2", "qwen3")


# Rows of 256 and 512 weights, which all types of GGUF hold.
WIDE = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "rope_parameters": ROPE}


def without_shift(scale: np.ndarray, shift: np.ndarray) -> None:
    """Make mu 0."""
    shift[:] = 0


def byte_level(*before: Any, own_split: bool = True, ignore_merges: bool = False) -> Any:
    """Byte-level BPE trained on the texts here, after steps that split words."""
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_split)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=390, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator([__doc__ or "", TEXT, tiny.words(300)], trainer)
    tokenizer.model.ignore_merges = ignore_merges
    return wrapped(tokenizer)


def sentencepiece() -> Any:
    """BPE over characters with bytes to fall back on."""
    tokenizer = Tokenizer(models.BPE(unk_token="<pad>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=[*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["They're here in 1984, it's 3.14! here he is, in there"], trainer)
    rules = json.loads(tokenizer.to_str())
    # Bytes are no special tokens, only the trainer has them as such.
    rules["added_tokens"] = rules["added_tokens"][: len(SPECIAL)]
    # As SentencePiece: a space comes before a text that begins with one, and after a special token.
    prepend, replace = normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")
    rules["normalizer"] = json.loads(normalizers.Sequence([prepend, replace]).__getstate__())
    rules["pre_tokenizer"] = None
    return wrapped(Tokenizer.from_str(json.dumps(rules)))


def wrapped(tokenizer: Tokenizer) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{{ messages[0].content }}",
    )


def write(
    folder: Path,
    config: Any,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
    block_size: int = 64,
    change: Callable[[np.ndarray, np.ndarray], None] = lambda scale, shift: None,
    order: Callable[[str, int], np.ndarray] = lambda name, columns: np.arange(columns),
    symmetric: bool = False,
) -> Path:
    """A checkpoint of random trits, with negative alphas, constant rows and mu beyond alpha."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    linearize(model)
    random = np.random.default_rng(0)
    linears = locate_layers(model).named_linears()
    matrices = {}
    for name, module in linears.items():
        n, m = module.weight.shape
        blocks = -(-m // block_size)
        scale = (random.normal(size=(n, blocks)) * 0.05).astype(np.float16)
        shift = (random.normal(size=(n, blocks)) * 0.02).astype(np.float16)
        scale[::9] = 0
        change(scale, shift)
        trits = random.integers(-1, 2, (n, m), dtype=np.int8)
        stored_shift = None if symmetric else shift
        matrices[name] = TernaryMatrix(trits, scale, stored_shift, order(name, m), block_size)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape))
    tied = getattr(model, "all_tied_weights_keys", {})
    kept = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.removesuffix(".weight") not in linears and name not in tied
    }
    settings = TernaryConfig(block_size=block_size, reorder="none", shift="none" if symmetric else "free")
    with CheckpointWriter(folder, 1, load_backend("reference")) as writer:
        writer.add(kept, matrices)
        writer.finish(
            Original(model, tokenizer or byte_level(), "random"),
            settings,
            modules=list(linears),
            shared_inputs=shared_inputs(list(linears)),
            coded=[],
            report={},
        )
    return folder


def with_own_code(checkpoint: Path, folder: Path, model_type: str = "own") -> Path:
    """A copy of a checkpoint of a LLaMA, with classes of its own that come with it."""
    shutil.copytree(checkpoint, folder)
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        "from .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n"
        f"class OwnConfig(LlamaConfig):\n    model_type = {model_type!r}\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    config.update(model_type=model_type, architectures=["OwnForCausalLM"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def code_cache(folder: Path) -> Iterator[None]:
    """A cache of its own for code that comes with models.

    Python would not look into a second one: it keeps the package that it has imported from the first.
    """
    package = dynamic_module_utils.TRANSFORMERS_DYNAMIC_MODULE_NAME
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / package).is_dir()])
        for name in _modules_of(package):
            patch.delitem(sys.modules, name)
        try:
            yield
        finally:
            for name in _modules_of(package):
                del sys.modules[name]


def _modules_of(package: str) -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == package]


def shared_inputs(names: list[str]) -> list[list[str]]:
    """The projections of a LLaMA that read one input."""
    groups: dict[str, list[str]] = {}
    for name in names:
        layer, _, own = name.rpartition(".")
        kind = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gated", "up": "gated"}.get(
            own.split("_")[0], own
        )
        groups.setdefault(f"{layer}.{kind}", []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def to_gguf(run_main: Run, folder: Path, out: Path, *arguments: object) -> Path:
    from harness.export.__main__ import main  # needs gguf, which machines with a GPU may lack

    assert run_main(main, folder, "--format", "gguf", "--out", out, *arguments) == 0
    return out


def read_gguf(file: Path, dtype: torch.dtype = torch.float32) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, output_loading_info=True
    )
    assert not any(info.values())
    return model.eval()


def raw(folder: Path) -> tuple[dict[str, torch.Tensor], list[str], int]:
    """A checkpoint's tensors, its packed layers and their block size."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    return tensors, quantization["modules"], quantization["block_size"]


def raw_grid(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """t, and alpha and mu in float64, all (n, m), decoded here from the bytes."""
    tensors, _, block_size = raw(folder)
    trits = tensors[f"{name}.trits"].long()
    digits = torch.stack([trits // 3**i % 3 for i in range(5)], dim=-1).flatten(1)
    config = json.loads((folder / "config.json").read_text())
    if name.endswith("down_proj"):
        m = config["intermediate_size"]
    elif name.endswith("o_proj"):
        m = config["num_attention_heads"] * (config.get("head_dim") or 32)
    else:
        m = config["hidden_size"]
    alpha, mu = (
        tensors[f"{name}.{part}"].double().repeat_interleave(block_size, dim=1)[:, :m]
        for part in ("scale", "shift")
    )
    return digits[:, :m] - 1, alpha, mu
