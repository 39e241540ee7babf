"""Write an export that is a folder: weights, config and tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from harness.errors import UserError
from harness.export.source import Stored
from harness.files import write_json
from harness.models.folder import CONFIG, GENERATION, move_into, staged
from harness.ternary.writing import save_code

# Suffixes of weight files that need a config.json beside them; a GGUF file does not.
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx")


def require_no_other_model(out: Path, own: str | None) -> None:
    """Refuse to overwrite the config.json and tokenizer of another model's weights.

    Parameters
    ----------
    out : Path
        The folder to write.
    own : str or None
        Name of a weight file that only an earlier export can have left there.
    """
    entries = sorted(out.iterdir()) if out.is_dir() else []
    others = [entry.name for entry in entries if entry.suffix in WEIGHT_FILES and entry.name != own]
    if others:
        raise UserError(
            f"{out} contains another model's weights ({others[0]}), and the export would overwrite their "
            "config.json; choose another --out"
        )


def write_folder(
    stored: Stored,
    out: Path,
    weights: str,
    tensors: dict[str, torch.Tensor],
    framework: str,
    settings: dict[str, Any],
) -> None:
    """Write a folder that appears only when complete.

    Parameters
    ----------
    stored : Stored
        The checkpoint; its tokenizer, generation config and code are copied.
    out : Path
        The folder.
    weights : str
        Name of the file of tensors.
    tensors : dict of torch.Tensor
        The tensors.
    framework : str
        Name of the framework that the file is for, as safetensors' metadata have it.
    settings : dict
        Entries of config.json that the model's own config has not, or not with this value.

    Raises
    ------
    UserError
        If it cannot be written.
    """
    with staged(out) as folder:
        try:
            save_file(tensors, folder / weights, metadata={"format": framework})
            (folder / weights).chmod(0o644)  # safetensors makes it readable by the owner only
            stored.tokenizer.save_pretrained(folder)
            if (stored.folder / GENERATION).is_file():
                shutil.copyfile(stored.folder / GENERATION, folder / GENERATION)
            save_code(stored.model, stored.config, folder)
            write_json(folder / CONFIG, stored.config.to_dict() | settings)
            move_into(folder, out, stale=(GENERATION,))
        except Exception as error:  # the tokenizer raises plain Exception on a full disk
            raise UserError(f"{out} could not be written: {error}") from None
