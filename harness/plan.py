"""What a run will take, said before it starts: matrices, bits, bytes, memory and time."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch

from harness.checkpoint import packed_bytes
from harness.models import DecoderLayers
from harness.pipeline import GramSum, LayerCall

# Seconds of `reference.ternarize` on one core of 2024: a weight, and a column cubed.
TERNARIZE_WEIGHT, TERNARIZE_CUBE = 7e-7, 2.2e-10

# Resident size of an interpreter with torch and transformers loaded.
IMPORTS_BYTES = 700e6


@dataclass(frozen=True)
class Plan:
    """Figures of a run.

    Attributes
    ----------
    matrices, weights : int
        Linear layers that are ternarized, and weights in them.
    packed_bytes, other_bytes : int
        Bytes of those as packed, and of everything else in the checkpoint.
    memory_bytes, seconds : float
        Expected peak resident memory, and time without evaluation.
    """

    matrices: int
    weights: int
    packed_bytes: int
    other_bytes: int
    memory_bytes: float
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """Bits of a ternarized weight, alpha, mu and permutation counted."""
        return 8 * self.packed_bytes / self.weights

    def lines(self) -> list[str]:
        """The plan in words."""
        size = self.packed_bytes + self.other_bytes
        return [
            f"  {self.matrices} matrices, {self.weights / 1e6:.1f} M weights, "
            f"{self.bits_per_weight:.3f} bits a weight with alpha, mu and permutation",
            f"  checkpoint {size / 1e6:.0f} MB ({self.packed_bytes / 1e6:.0f} MB ternary, "
            f"{self.other_bytes / 1e6:.0f} MB embeddings, head and norms as they are)",
            f"  about {self.memory_bytes / 1e9:.1f} GB of memory, "
            f"{duration(self.seconds)} without evaluation",
        ]


def make_plan(
    model: Any,
    decoder: DecoderLayers,
    hidden: list[torch.Tensor],
    call: LayerCall,
    block_size: int,
    permuted: bool,
    true_sequential: bool,
    evaluation_seqlen: int,
) -> Plan:
    """Estimate a run from the shapes and from one timed pass of the first layer."""
    linears = list(decoder.named_linears().values())
    shapes = [linear.weight.shape for linear in linears]
    weights = sum(rows * columns for rows, columns in shapes)
    item = next(model.parameters()).element_size()
    total = sum(p.numel() for p in model.parameters())
    widest = max(columns for _, columns in shapes)
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in decoder.layers)

    forward, gram = _time_layer(decoder, hidden[0], call)
    passes = 5 if true_sequential else 2  # q/k/v, o, gate/up and down are collected one by one
    fitting = sum(TERNARIZE_WEIGHT * rows * columns + TERNARIZE_CUBE * columns**3 for rows, columns in shapes)
    return Plan(
        matrices=len(linears),
        weights=weights,
        packed_bytes=sum(packed_bytes(rows, columns, block_size, permuted) for rows, columns in shapes),
        other_bytes=item * (total - weights),
        memory_bytes=IMPORTS_BYTES
        + item * total
        # One layer in float32, and its weights in float64 as they are fitted.
        + 12 * layer
        + item * evaluation_seqlen * getattr(model.config.get_text_config(), "vocab_size", 0)
        + sum(states.numel() * states.element_size() for states in hidden)
        # Gram matrices of a layer, and what the inverse of the widest takes, side by side.
        + 12 * sum({columns: columns**2 for _, columns in shapes}.values()) * 2
        + 8 * 6 * widest**2 * min(torch.get_num_threads(), len(decoder.linears[0]))
        + 16 * max(shape.numel() for shape in shapes),
        seconds=len(decoder.layers) * len(hidden) * (passes * forward + gram) + fitting,
    )


def duration(seconds: float) -> str:
    """A length of time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


@torch.no_grad()
def _time_layer(decoder: DecoderLayers, hidden: torch.Tensor, call: LayerCall) -> tuple[float, float]:
    """Seconds of one float32 pass of a window through a layer, and of the Gram products of its inputs."""
    layer = copy.deepcopy(decoder.layers[0]).float()
    call(layer, hidden.float())  # the first pass also allocates and picks kernels
    begin = time.perf_counter()
    call(layer, hidden.float())
    forward = time.perf_counter() - begin
    widths = {linear.in_features for linear in decoder.linears[0].values()}
    sums = {width: GramSum(width) for width in widths}
    rows = torch.ones(hidden.shape[0] * hidden.shape[1], max(widths))
    begin = time.perf_counter()
    for width, total in sums.items():
        total.add(rows[:, :width].contiguous())
    # Inputs of the hidden width feed q/k/v, o and gate/up; the widest only one matrix.
    return forward, 2 * (time.perf_counter() - begin)
