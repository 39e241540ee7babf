"""Other people's quantizers, each by its own package and in a process of its own, on the same windows.

Packages patch transformers when they are imported, so this process never imports one. What a peer writes is a
plain Hugging Face folder with the dequantized weights, which is measured like any model.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from harness.calibration.methods import two_bits
from harness.errors import UserError
from harness.models.decoder import locate_layers
from harness.models.loading import load_original
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
        Columns that share a scale and a zero point.
    shared : int
        Bits of these two.
    flat : bool
        Whether groups run on from row to row.
    trains : bool
        Whether it takes steps of gradient descent, whose number is a setting.
    """

    words: str
    module: str
    package: str
    group: int
    shared: int = 16 + 2
    flat: bool = False
    trains: bool = False

    def bits_per_weight(self, shapes: list[tuple[int, int]]) -> float:
        """Return bits per weight of matrices of n rows and m columns."""
        rows = [(1, n * m) for n, m in shapes] if self.flat else shapes
        return two_bits(rows, self.group, self.shared)


PEERS = {
    "auto-round": Peer("AutoRound, 2 bits, groups of 128", "auto_round", "auto-round", 128, trains=True),
    "gptqmodel": Peer("GPTQModel, 2 bits, groups of 128", "gptqmodel", "gptqmodel", 128),
    # HQQ's own group size. Its zero points have a fraction.
    "hqq": Peer("HQQ, 2 bits, groups of 64", "hqq", "hqq", 64, shared=16 + 16, flat=True),
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
        Steps of gradient descent per layer, of a peer that trains.
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
    folder = folder.resolve()  # a peer may change its working folder
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

    count, seqlen = load_file(data)[WINDOWS].shape
    quantizer = AutoRound(
        source,
        scheme="W2A16",
        group_size=int(group),
        sym=False,
        dataset=_rows(data),
        iters=int(iterations),
        seqlen=seqlen,
        nsamples=count,
        batch_size=min(8, count),  # its default
        device_map=_device(),
        seed=0,
    )
    quantizer.quantize_and_save(out, format="fake")


def gptqmodel(source: str, data: str, out: str, group: str, _iterations: str) -> None:
    """Quantize by GPTQModel to 2 bits with zero points; write dense weights."""
    # The package starts a worker for every two cores and wants two of them, which two cores do not give.
    if (os.cpu_count() or 1) < 3:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    # It would compile its packing of the weights, which are unpacked again at once.
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.utils.model_dequant import dequantize_model

    os.chdir(Path(out).parent)  # it writes a folder of logs into the working folder
    dtype = AutoConfig.from_pretrained(source).dtype
    # The order of the columns is its default: whole groups by activation, and columns inside a group.
    config = QuantizeConfig(bits=2, group_size=int(group), sym=False, device=_device(), offload_to_disk=False)
    model = GPTQModel.load(source, config, dtype=dtype)
    model.quantize(list(_rows(data)), batch_size=1)
    packed = Path(out).with_name("packed")
    model.save(packed)
    dequantize_model(packed, out, target_dtype=dtype)


def hqq(source: str, _data: str, out: str, group: str, _iterations: str) -> None:
    """Quantize by HQQ to 2 bits with zero points, from the weights alone; write dense weights."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    original = load_original(source)
    config = BaseQuantizeConfig(nbits=2, group_size=int(group), axis=1)
    for linear in locate_layers(original.model).named_linears().values():
        held = HQQLinear(linear, config, compute_dtype=torch.float16, device=_device(), del_orig=False)
        linear.weight.data.copy_(held.dequantize())
    original.model.save_pretrained(out)
    original.tokenizer.save_pretrained(out)


def _rows(data: str) -> torch.utils.data.DataLoader:
    """Read the calibration windows, one at a time."""
    windows = load_file(data)[WINDOWS]
    rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows]
    return torch.utils.data.DataLoader(rows, batch_size=1)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
