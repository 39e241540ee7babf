"""Records of runs that never ran, of any size, with random figures."""

from __future__ import annotations

import random
from typing import Any

DENSE = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def record_of(
    layers: int = 3, kinds: tuple[str, ...] = DENSE, experts: int = 0, seed: int = 0
) -> dict[str, Any]:
    """The contents of a report.json; with `experts`, the matrices of the MLP exist once for each."""
    draw = random.Random(0)
    return {
        "created": "2001-02-03T04:05:06+00:00",
        "model": "some/model",
        "dtype": "bfloat16",
        "original": {"model.safetensors": "0" * 64},
        "method": "pt2-llm",
        "backend": "cpu",
        "config": {"block_size": 128, "damping": 0.01, "grid": "float16", "shift": "free", "itf": True},
        "plan": {
            "matrices": 21,
            "weights": 123_000_000,
            "layer_weights": 246_000_000,
            "not_understood": "",
            "packed_bytes": 30_750_000,
            "other_bytes": 4_000_000,
        },
        "bits_per_weight": 2.0,
        "options": {"recipe": "best", "out": "some folder", "strict": False},
        "calibration": {
            "text": "some text",
            "tokens": 4096,
            "bos": "no BOS token",
            "nsamples": 8,
            "seqlen": 512,
            "targets": "stream",
            "computed_in": "float32",
        },
        "versions": {"python": "3.99.1", "torch": "9.8.7"},
        "machine": "abacus",
        "cores": 3,
        "device": "CPU",
        "original_bytes": 400_000_000,
        "checkpoint_bytes": 35_000_000,
        "command": "python -m harness.quantize some/model --out 'some folder'",
        "perplexity": {
            "before": {"value": 12.3456, "protocol": "some protocol"},
            "after": {"value": 34.5678, "protocol": "some protocol"},
        },
        "seconds": {"load": 1.25, "perplexity before": 2.5, "layers": 40.0, "perplexity after": 3.75},
        "layers": [layer_of(number, kinds, experts, draw) for number in range(layers)],
        "resumed_after": [],
        "mean_relative_output_error": 0.0625,
        "peak_memory_bytes": 1_500_000_000,
        "peak_device_bytes": 0,
    }


def layer_of(number: int, kinds: tuple[str, ...], experts: int, draw: random.Random) -> dict[str, Any]:
    names = []
    for kind in kinds:
        own = kind.removeprefix("mlp.")
        names += [f"mlp.experts.{e}.{own}" for e in range(experts)] if experts and own != kind else [kind]
    rows = [matrix_of(f"model.layers.{number}.{name}", draw) for name in names]
    grids = [kind.replace("mlp.", "mlp.experts.*.") if experts else kind for kind in kinds]
    return {
        "layer": number,
        "relative_output_error": draw.random() / 8,
        "seconds": {"load": 0.5, "inputs": 2.0, "fits": 5.0, "outputs": 1.0},
        "shared_inputs": [],
        "grid": {kind: grid_of(draw) for kind in grids},
        "matrices": rows,
        "outputs_checksum": 0,
    }


def matrix_of(name: str, draw: random.Random) -> dict[str, Any]:
    start = draw.uniform(0.1, 0.3)
    return {
        "name": name,
        "shape": [512, 256],
        "tokens": 4096,
        "dead_inputs": 0,
        "lost_blocks": 0.0,
        "seconds": 0.5,
        "trits": [draw.randrange(1, 40_000) for _ in range(3)],
        "damping": 0.01,
        "weight_power": draw.uniform(1, 9),
        "output_power": draw.uniform(1, 9),
        "iterations": 3,
        "weight_errors": [start * 0.9**step for step in range(draw.randrange(2, 7))],
        "aligned_weight_error": start,
        "output_errors": {"init": start, "itf": start * 0.9, "aga": start * 0.7},
        "variance_before": draw.uniform(1, 2),
        "variance_after": draw.uniform(0.5, 1),
        "relative_output_error": draw.random() / 8,
        "refinement_errors": [start * 0.8, start * 0.75],
    }


def grid_of(draw: random.Random) -> dict[str, Any]:
    return {
        "alpha": {"first": -24, "counts": [draw.randrange(100) for _ in range(12)] + [1]},
        "mu": {"first": -6, "counts": [draw.randrange(100) for _ in range(12)] + [1]},
        "constant": 0,
    }
