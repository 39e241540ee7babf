"""Going on with a run that was stopped, to the same bytes that it would have written.

What it had ternarized is read from its shards. Hidden states are not stored, which would take longer than
all else on a fast device: the layers that are done are run once more, and a checksum tells that each gives
what it gave before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from harness.errors import UserError
from harness.files import json_text
from harness.models.decoder import DecoderLayers
from harness.ternary.format import PACKED
from harness.ternary.linear import TernaryLinear
from harness.ternary.writing import load_shard
from reference.types import TernaryConfig

# What must be the same in the reports of both runs; of the options, what is not in another part.
SAME = ("model", "dtype", "method", "backend", "device", "machine", "config", "calibration", "versions")


SAME_OPTIONS = ("embedding", "gguf_dtype", "trust_remote_code")


EVALUATION_OPTIONS = ("evaluation", "evaluation_seqlen", "evaluation_windows", "text_column")


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(hidden: list[torch.Tensor]) -> int:
    """A sum over the bits of hidden states, which lie on one device and are there."""
    sums = [states.view(_BITS[states.element_size()]).sum(dtype=torch.int64) for states in hidden]
    return int(torch.stack(sums).sum())


def continued(record: dict[str, Any], earlier: dict[str, Any], out: Path) -> None:
    """Put what an earlier run has come to into the record of this one, if it is the same run.

    Parameters
    ----------
    record : dict
        Of this run before its first layer.
    earlier : dict
        As `harness.models.folder.unfinished` reads it.
    out : Path
        Where the earlier run lies.

    Raises
    ------
    UserError
        If they are not the same; names what differs.
    """
    was, now = dict(_facts(earlier)), dict(_facts(json.loads(json_text(record))))
    for name in [*was, *(name for name in now if name not in was)]:
        if was.get(name) != now.get(name):
            raise UserError(
                f"{out} holds another run than this: {name} was {was.get(name)} and is {now.get(name)}; "
                "repeat its command with --resume, or begin anew with --force"
            )
    record["created"] = earlier["created"]
    record["layers"] = earlier["layers"]
    record["resumed_after"] = [*earlier["resumed_after"], len(earlier["layers"])]
    record["seconds"] = earlier["seconds"]
    if all(record["options"][name] == earlier["options"][name] for name in EVALUATION_OPTIONS):
        record["perplexity"] = earlier["perplexity"]


def _facts(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What must be the same, by names that a user knows."""
    options = {name: record["options"][name] for name in SAME_OPTIONS}
    for part, value in {"options": options, **{part: record[part] for part in SAME}}.items():
        if isinstance(value, dict):
            yield from ((f"{part}.{name}", entry) for name, entry in value.items())
        else:
            yield part, value


def stored_weights(
    shard: Path, decoder: DecoderLayers, index: int, config: TernaryConfig, device: torch.device
) -> dict[str, torch.Tensor]:
    """The weights of a layer that is done, by their names in the layer, in the dtype of the model.

    Raises
    ------
    UserError
        If the shard is damaged.
    """
    tensors = load_shard(shard)
    weights = {}
    for name, linear in decoder.linears[index].items():
        prefix = f"{decoder.full_name(index, name)}."
        parts = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        layer = TernaryLinear(
            linear.in_features,
            linear.out_features,
            config.block_size,
            config.grid,
            permuted="permutation" in parts,
            bias=False,
            dtype=linear.weight.dtype,
        )
        try:
            layer.load_state_dict({part: parts[part] for part in PACKED if part in parts}, assign=True)
        except RuntimeError as error:
            raise UserError(f"{shard} is damaged ({error}); begin anew with --force") from None
        weights[name] = layer.to(device).dequantize()
    return weights
