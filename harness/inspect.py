"""Show the contents of a ternary checkpoint, every byte counted: python -m harness.inspect PATH."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.cli import HelpFormatter, add_trust_remote_code, add_verbose, path, run
from harness.files import json_text
from harness.hf import load_stored
from harness.ternary.format import PACKED, unpack_base3
from harness.ternary.linear import TernaryLinear
from harness.ternary.reading import tensors_of, weight_map
from harness.words import counted

DESCRIPTION = """\
Show the contents of a ternary checkpoint. For each ternary layer: its shape, bytes, bits per weight and
the shares of -1, 0 and +1. For the whole checkpoint: bytes and bits per weight by kind of tensor.

  python -m harness.inspect smollm2-ternary
"""

KINDS = {
    "trits": "trits, five to a byte",
    "scale": "alpha",
    "shift": "mu",
    "permutation": "permutations",
    "factor": "factors of rows and blocks",
    "rest": "embeddings, head, norms and biases",
}


@dataclass(frozen=True)
class Layer:
    """A packed matrix; `counts` are the numbers of trits -1, 0 and +1."""

    name: str
    rows: int
    columns: int
    bytes: int
    counts: tuple[int, int, int]

    @property
    def bits(self) -> float:
        """Bits per weight, including alpha, mu and the permutation."""
        return 8 * self.bytes / (self.rows * self.columns)


def describe(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Collect the sizes and layers of a checkpoint.

    Parameters
    ----------
    folder : Path
        A ternary checkpoint.
    trust_remote_code : bool
        Whether Python code shipped with the model may run.

    Returns
    -------
    dict
        ``block_size``; ``bytes`` by kind of tensor (`KINDS`); ``bytes_on_disk``, the size of the weight
        files including headers; ``layers``, a list of `Layer`.

    Raises
    ------
    UserError
        If the folder is not a ternary checkpoint, or one of its files or tensors is missing or damaged.
    """
    model = load_stored(folder, trust_remote_code=trust_remote_code)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, TernaryLinear)}
    sizes = dict.fromkeys(KINDS, 0)
    for name, tensor in tensors_of(folder):
        module, _, part = name.rpartition(".")
        kind = part.rpartition("_")[2] if module in layers and part in PACKED else "rest"
        sizes[kind] += tensor.numel() * tensor.element_size()
    files = set(weight_map(folder).values())
    return {
        "block_size": model.config.quantization_config.block_size,
        "bytes": sizes,
        "bytes_on_disk": sum((folder / file).stat().st_size for file in files),
        "layers": [_layer(name, layer) for name, layer in layers.items()],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Format the description for people."""
    layers: list[Layer] = found["layers"]
    weights = sum(layer.rows * layer.columns for layer in layers)
    ternary = sum(found["bytes"][kind] for kind in KINDS if kind != "rest")
    width = max(len(layer.name) for layer in layers)
    text = [f"{'layer':{width}}  {'shape':>13}  {'bytes':>12}  {'bits':>6}  {'-1':>6} {'0':>6} {'+1':>6}"]
    for layer in layers:
        total = sum(layer.counts)
        shares = " ".join(f"{count / total:6.1%}" for count in layer.counts)
        shape = f"{layer.rows} x {layer.columns}"
        text.append(f"{layer.name:{width}}  {shape:>13}  {layer.bytes:12,}  {layer.bits:6.3f}  {shares}")
    text.append("")
    for kind, what in KINDS.items():
        size = found["bytes"][kind]
        share = f"{8 * size / weights:7.3f} bits per weight" if kind != "rest" else ""
        text.append(f"{what:36} {size:16,} bytes  {share}".rstrip())
    text.append(
        f"{'all ternary layers':36} {ternary:16,} bytes  {8 * ternary / weights:7.3f} bits per weight"
    )
    text.append(f"{'weight files on disk':36} {found['bytes_on_disk']:16,} bytes")
    text.append(
        f"{counted(len(layers), 'ternary layer')}, {weights:,} weights, "
        f"blocks of {found['block_size']} columns"
    )
    return text


def _layer(name: str, layer: TernaryLinear) -> Layer:
    parts = [getattr(layer, part) for part in PACKED]
    size = sum(tensor.numel() * tensor.element_size() for tensor in parts if tensor is not None)
    # Count bytes, not trits: unpacked, the trits of a large layer take five times the memory.
    occurrences = torch.bincount(layer.trits.flatten().long(), minlength=3**5)
    codes = unpack_base3(torch.arange(3**5, dtype=torch.uint8)[:, None], 5)
    minus, zero, plus = (int(((codes == t).sum(1) * occurrences).sum()) for t in (-1, 0, 1))
    zero -= layer.out_features * (5 * layer.trits.shape[1] - layer.in_features)  # padding of the rows
    return Layer(name, layer.out_features, layer.in_features, size, (minus, zero, plus))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.inspect", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    parser.add_argument("path", type=path, metavar="PATH", help="folder of a ternary checkpoint")
    parser.add_argument("--json", action="store_true", help="print a single JSON object")
    add_trust_remote_code(parser)
    add_verbose(parser)
    arguments = parser.parse_args()
    found = describe(arguments.path, arguments.trust_remote_code)
    if arguments.json:
        print(json_text({**found, "layers": [vars(layer) for layer in found["layers"]]}))
    else:
        print("\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    run(main)
