"""Resume an interrupted run; the output is byte-identical to that of an uninterrupted one.

Finished layers are read from their shards. Hidden states are not stored, because on a fast device writing
them would take longer than everything else. Instead, finished layers run once more, and a checksum shows that
each gives the same outputs as before. That the model is the same is told by the checksums of its files
(`harness.models.identity`).
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from harness.distributed.ranks import Ranks
from harness.errors import UserError
from harness.files import json_text
from harness.models.decoder import DecoderLayers
from harness.models.folder import PROGRESS, STAGING
from harness.quantize.record import Record
from harness.ternary.format import PACKED
from harness.ternary.linear import TernaryLinear
from harness.ternary.writing import load_shard
from reference.types import TernaryConfig

# Entries that must agree in both records, and options that must agree and are in none of these entries.
SAME = ("dtype", "method", "backend", "device", "machine", "config", "calibration", "versions")
SAME_OPTIONS = ("embedding", "foldable", "gguf_dtype", "trust_remote_code")
EVALUATION_OPTIONS = ("evaluation", "evaluation_seqlen", "evaluation_windows", "text_column")


def continue_from(earlier: dict[str, Any], record: Record, out: Path) -> None:
    """Copy the finished layers of an interrupted run into the record of this run.

    Parameters
    ----------
    earlier : dict
        The record of the interrupted run, as `harness.models.folder.unfinished` reads it.
    record : Record
        The record of this run, before its first layer.
    out : Path
        Folder of the interrupted run.

    Raises
    ------
    UserError
        If model, text, settings, libraries or machine differ; the message names the difference.
    """
    now = dict(facts(json.loads(json_text(record.to_json()))))
    try:
        was = dict(facts(earlier))
        checksums = [row["outputs_checksum"] for row in earlier["layers"]]
        resumed_after, created, seconds = (earlier[name] for name in ("resumed_after", "created", "seconds"))
        options, perplexity = earlier["options"], earlier["perplexity"]
    except (KeyError, TypeError):
        raise UserError(f"{out / STAGING / PROGRESS} is damaged; start over with --force") from None
    _require_same_original(earlier, record, out)
    for name in [*was, *(name for name in now if name not in was)]:
        if was.get(name) != now.get(name):
            raise UserError(
                f"{out} holds a different run: {name} was {was.get(name)} and is {now.get(name)}; "
                "repeat the command of that run with --resume, or start over with --force"
            )
    record.created, record.layers, record.seconds = created, earlier["layers"], seconds
    record.resumed_after = [*resumed_after, len(checksums)]
    same_text = record.evaluation_checksum == earlier.get("evaluation_checksum")
    if same_text and all(record.options[name] == options.get(name) for name in EVALUATION_OPTIONS):
        record.perplexity = perplexity


def require_same(record: Record, ranks: Ranks) -> None:
    """Refuse a run whose processes see different models, texts, settings, libraries or machines.

    Raises
    ------
    UserError
        If the record of a process differs from that of the first one; the message names both.
    """
    own = {
        **dict(facts(record.to_json())),
        **{f"original: {name}": checksum for name, checksum in (record.original or {}).items()},
        "evaluation text": record.evaluation_checksum,
        "threads": torch.get_num_threads(),
    }
    everyone = ranks.gather([socket.gethostname(), own])
    first_host, first = everyone[0]
    for rank, (host, other) in enumerate(everyone):
        for name in [*first, *(name for name in other if name not in first)]:
            if other.get(name) != first.get(name):
                raise UserError(
                    f"rank {rank} on {host} would compute something else than rank 0 on {first_host}: {name} "
                    f"is {other.get(name)} there, and {first.get(name)} here; give all processes the same "
                    "command, model, text and libraries"
                )


def _require_same_original(earlier: dict[str, Any], record: Record, out: Path) -> None:
    """Refuse a model that has changed, and name the first file that differs; its place may be another."""
    was, now = earlier.get("original"), record.original or {}
    if not isinstance(was, dict):
        raise UserError(
            f"{out / STAGING / PROGRESS} is of an older version, which did not note what the original was; "
            "start over with --force"
        )
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            then, today = (str(files.get(name, "absent"))[:12] for files in (was, now))
            raise UserError(
                f"{out} holds a run of another original: {name} of {record.model} is not what that run read "
                f"({then} then, {today} now); put the model back and repeat the command of that run with "
                "--resume, or start over with --force"
            )


def facts(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """List the entries that must agree in both runs, under names that a user knows."""
    options = {name: record["options"][name] for name in SAME_OPTIONS}
    for part, value in {"options": options, **{part: record[part] for part in SAME}}.items():
        if isinstance(value, dict):
            yield from ((f"{part}.{name}", entry) for name, entry in value.items())
        else:
            yield part, value


def stored_weights(
    shard: Path, decoder: DecoderLayers, index: int, config: TernaryConfig, device: torch.device
) -> dict[str, torch.Tensor]:
    """Dequantize the weights of a finished layer, by their names in the layer, in the dtype of the model.

    Raises
    ------
    UserError
        If the shard is damaged.
    """
    tensors = load_shard(shard)
    for name, tensor in decoder.other_tensors(index).items():
        if name not in tensors or not torch.equal(tensors[name], tensor):
            raise UserError(
                f"{name} in {shard} is not the model's: the shard is damaged; start over with --force"
            )
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
            symmetric=config.symmetric,
        )
        try:
            layer.load_state_dict({part: parts[part] for part in PACKED if part in parts}, assign=True)
        except RuntimeError as error:
            raise UserError(f"{shard} is damaged ({error}); start over with --force") from None
        weights[name] = layer.to(device).dequantize()
    return weights
