"""Other people's quantizers, each by its own package and in a process of its own, on the same windows.

Packages patch transformers when they are imported, so this process never imports one. What a peer writes is a
plain Hugging Face folder with the dequantized weights, which is measured like any model.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from harness.errors import UserError
from harness.models.original import Original

WINDOWS = "input_ids"


@dataclass(frozen=True)
class Peer:
    """A package that quantizes.

    Attributes
    ----------
    words : str
        Label of its row.
    module : str
        What is imported; a function of this name, in this module, runs in the peer's process.
    package : str
        What is installed, by the extra of this name.
    group : int
        Columns that share a 16-bit scale and a zero point of 2 bits.
    """

    words: str
    module: str
    package: str
    group: int


PEERS = {
    "auto-round": Peer("AutoRound, 2 bits, groups of 128", "auto_round", "auto-round", 128),
}


def require_installed(names: tuple[str, ...]) -> None:
    """Refuse a peer whose package is not installed."""
    for name in names:
        peer = PEERS[name]
        if importlib.util.find_spec(peer.module) is None:
            raise UserError(
                f"--peers {name} requires the package `{peer.package}`; "
                f"run pip install '.[{peer.package}]' in the clone"
            )


def quantize_by(peer: Peer, original: Original, windows: torch.Tensor, iterations: int, folder: Path) -> Path:
    """Quantize a model by a peer.

    Parameters
    ----------
    peer : Peer
        The peer.
    original : Original
        The model, which is written to `folder` for it.
    windows : (samples, seqlen) int64 tensor
        Calibration windows.
    iterations : int
        Steps of gradient descent per layer.
    folder : Path
        Where to write.

    Returns
    -------
    Path
        The folder of the quantized model, with dense weights.

    Raises
    ------
    UserError
        If the peer fails.
    """
    source, data, out = folder / "original", folder / "windows.safetensors", folder / "quantized"
    original.model.save_pretrained(source)
    original.tokenizer.save_pretrained(source)
    save_file({WINDOWS: windows}, data)
    call = f"import sys; from {__name__} import {peer.module} as run; run(*sys.argv[1:])"
    arguments = [str(source), str(data), str(out), str(peer.group), str(iterations)]
    done = subprocess.run([sys.executable, "-c", call, *arguments], stdout=sys.stderr, check=False)
    found = sorted(file.parent for file in out.rglob("config.json"))
    if done.returncode or not found:
        raise UserError(f"{peer.package} failed with status {done.returncode}; its messages are above")
    return found[0]


def auto_round(source: str, data: str, out: str, group: str, iterations: str) -> None:
    """Quantize by AutoRound to 2 bits with zero points; write dense weights."""
    from auto_round import AutoRound

    windows = load_file(data)[WINDOWS]
    rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows]
    count, seqlen = windows.shape
    quantizer = AutoRound(
        source,
        scheme="W2A16",
        group_size=int(group),
        sym=False,
        dataset=torch.utils.data.DataLoader(rows, batch_size=1),
        iters=int(iterations),
        seqlen=seqlen,
        nsamples=count,
        batch_size=min(8, count),  # its default
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        seed=0,
    )
    quantizer.quantize_and_save(out, format="fake")
