"""Estimate a run before it starts: matrices, bits, bytes, memory and time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from harness.backends import CPU, Backend
from harness.calibration.gram import GramSum
from harness.calibration.methods import ternarizer
from harness.calibration.passage import Passage, brought
from harness.calibration.targets import KEPT_BYTES, SWEEPS, TURNS
from harness.compute import Compute, seconds_of
from harness.distributed.ranks import Ranks
from harness.machine import duration
from harness.models.decoder import DecoderLayers, describe_parameters
from harness.models.experts import family
from harness.models.original import Original
from harness.quantize.options import PT2_LLM, WEIGHTS, Options
from harness.ternary.format import packed_bytes
from harness.words import counted
from reference.types import TernaryConfig

# Seconds of `reference.ternarize` on one core of 2024: per weight, and per column cubed.
TERNARIZE_WEIGHT, TERNARIZE_CUBE = 7e-7, 2.2e-10

# Resident size of an interpreter with torch and transformers loaded.
IMPORTS_BYTES = 700e6
# Share by which memory that is freed and not given back makes the peak larger.
FRAGMENTS = 0.15


@dataclass(frozen=True)
class Plan:
    """The estimated figures of a run.

    Attributes
    ----------
    matrices, weights : int
        Linear layers to ternarize, and weights in them.
    layer_weights : int
        Weights in the decoder layers, ternarized or not.
    not_understood : str
        What is left as it is because it is not understood; empty if there is nothing.
    skipped : str
        What is left as it is because text alone does not go through it; empty if there is nothing.
    packed_bytes, other_bytes : int
        Bytes of the packed matrices, and of everything else in the checkpoint.
    memory_bytes, device_bytes, seconds : float
        Peak of resident memory, rather too large than too small; expected peak of device memory without
        hidden states (0 without a device); expected time without evaluation.
    processes : int
        Processes that share the run.
    """

    matrices: int
    weights: int
    layer_weights: int
    not_understood: str
    packed_bytes: int
    other_bytes: int
    memory_bytes: float
    device_bytes: float
    seconds: float
    processes: int = 1
    skipped: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Bits per ternarized weight, including alpha, mu and permutation."""
        return 8 * self.packed_bytes / self.weights

    def lines(self) -> list[str]:
        """Return the lines to print."""
        size = self.packed_bytes + self.other_bytes
        return [
            f"  {counted(self.matrices, 'matrix')}, {self.weights / 1e6:.1f} M weights "
            f"({self.weights / self.layer_weights:.1%} of the decoder layers), "
            f"{self.bits_per_weight:.3f} bits per weight including alpha, mu and permutation",
            *(f"  left as it is: {what}" for what in (self.not_understood, self.skipped) if what),
            f"  checkpoint {size / 1e6:.0f} MB ({self.packed_bytes / 1e6:.0f} MB ternary, "
            f"{self.other_bytes / 1e6:.0f} MB embeddings, head and norms)",
            f"  about {self.memory_bytes / 1e9:.1f} GB of memory, "
            + (f"{self.device_bytes / 1e9:.1f} GB of device memory, " if self.device_bytes else "")
            + (f"in each of {self.processes} processes, " if self.processes > 1 else "")
            + f"{duration(self.seconds)} without evaluation",
        ]


def make_plan(
    options: Options,
    original: Original,
    backend: Backend,
    passage: Passage,
    evaluated: bool,
    saved_bytes: int,
    ranks: Ranks,
) -> Plan:
    """Estimate a run from the shapes of the matrices and one timed pass of the first layer.

    Parameters
    ----------
    options : Options
        Options of the run.
    original : Original
        The model.
    backend : Backend
        Backend that ternarizes matrices.
    passage : Passage
        The first window, as input of the first layer.
    evaluated : bool
        Whether perplexity is measured.
    saved_bytes : int
        Bytes that 8-bit codes save on embedding and head.
    ranks : Ranks
        The processes that share the run; memory is that of each.
    """
    decoder, compute, config = passage.decoder, passage.compute, options.config
    window, windows = passage.hidden[0], -(-options.nsamples // ranks.size)
    evaluation_seqlen = options.evaluation_seqlen if evaluated else 0
    model = original.model
    linears = decoder.named_linears()
    shapes = [linear.weight.shape for linear in linears.values()]
    weights = sum(rows * columns for rows, columns in shapes)
    item = next(model.parameters()).element_size()
    total = sum(p.numel() for p in model.parameters())
    widest = max(columns for _, columns in shapes)
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in decoder.layers)
    packed = sum(
        packed_bytes(rows, columns, config.block_size, config.grid, options.reorders(name), config.symmetric)
        for name, (rows, columns) in zip(linears, shapes, strict=True)
    )
    seqlen = window.shape[1]
    # Of one window, by the original and the quantized model.
    logits = 2 * item * evaluation_seqlen * getattr(model.config.get_text_config(), "vocab_size", 0)
    beside = options.targets != WEIGHTS  # the original model runs beside the quantized one
    states = (2 if beside else 1) * windows * window.numel() * window.element_size()
    states += windows * sum(call.bytes_of_windows() for call in passage.calls)

    # Gram matrices of a layer, in pairs of float64 with a float32 chunk; most layers have two or three of one
    # width.
    grams = 20 * sum({columns: columns**2 for _, columns in shapes}.values()) * 2
    in_memory = item * (total if original.read is None else total - weights + layer)
    device = compute.memory is not None
    fit = 8 * 3 * widest**2 + 20 * max(shape.numel() for shape in shapes)
    host_fits = 8 * 6 * widest**2 * min(torch.get_num_threads(), len(decoder.linears[0]))
    kept = 0.0
    if beside:
        layer, grams = 2 * layer, 2 * grams
        # Inputs and outputs of the original layer: some five tensors of the hidden width in float32.
        kept = min(KEPT_BYTES, 20 * windows * window.numel())
    grams += _expert_sums(decoder, beside)
    host_layer = 12 * layer + kept + grams + host_fits + 16 * max(shape.numel() for shape in shapes)

    if backend.name == CPU and options.method == PT2_LLM:
        _compile(backend, compute, config)
    forward, gram = _time_layer(passage)
    # With true-sequential: one pass each for inputs of q/k/v, o, gate/up and down, and one for the outputs.
    passes = 5 if options.true_sequential else 2
    if beside:
        # One pass of the original layer; passes of the other end as soon as the inputs are there.
        passes, gram = 4 if options.true_sequential else 3, 2 * gram
        if options.true_sequential and any(family(decoder.layers[-1], name) for name in decoder.linears[-1]):
            passes += SWEEPS * TURNS - 1
    if device:
        fitting = _time_block(backend, compute, config) * sum(-(-m // config.block_size) for _, m in shapes)
        fitting += _time_refinement(compute, config, shapes)
    else:
        fitting = sum(TERNARIZE_WEIGHT * n * m + TERNARIZE_CUBE * m**3 for n, m in shapes)
    return Plan(
        matrices=len(linears),
        weights=weights,
        layer_weights=sum(p.numel() for p in decoder.layers.parameters()),
        not_understood=_left(model, decoder),
        packed_bytes=packed,
        other_bytes=item * (total - weights) - saved_bytes,
        memory_bytes=(1 + FRAGMENTS)
        * (IMPORTS_BYTES + in_memory + states + (0 if device else host_layer) + logits),
        # The layer, its weights before and after quantization, and the activations of one window.
        device_bytes=2 * item * layer + grams + fit + 16 * item * seqlen * widest if device else 0,
        seconds=len(decoder.layers) * windows * (passes * forward + gram) + fitting / ranks.size,
        processes=ranks.size,
        skipped=_skipped(decoder),
    )


def _expert_sums(decoder: DecoderLayers, beside: bool) -> int:
    """Bytes that one pass sums for all experts of a layer: Gram matrices, their copies, lost products."""

    def size(linear: nn.Linear) -> int:
        m, n = linear.in_features, linear.out_features
        return 28 * m**2 + (20 * m * max(m, n) if beside else 0)

    return max(
        sum(size(linear) for name, linear in linears.items() if family(layer, name))
        for layer, linears in zip(decoder.layers, decoder.linears, strict=True)
    )


def _left(model: nn.Module, decoder: DecoderLayers) -> str:
    """Say how many weights are left because they are not understood, and where."""
    unknown = decoder.not_understood()
    if not unknown:
        return ""
    weights = sum(parameter.numel() for parameter in unknown.values())
    return (
        f"{weights / 1e6:.2f} M weights that are not understood, or shared by layers (--strict refuses "
        f"them): "
        f"{describe_parameters(model, unknown)}"
    )


def _skipped(decoder: DecoderLayers) -> str:
    """Say which layers text skips, and how many weights they have."""
    if not decoder.skipped:
        return ""
    weights = sum(p.numel() for index in decoder.skipped for p in decoder.layers[index].parameters())
    numbers = ", ".join(map(str, decoder.skipped))
    return (
        f"{weights / 1e6:.2f} M weights of layers of {decoder.prefix} that text alone does not go through: "
        f"{numbers}"
    )


@torch.no_grad()
def _time_layer(passage: Passage) -> tuple[float, float]:
    """Time one forward pass of a layer on a window, and the Gram products of its inputs; in seconds."""
    compute, layer = passage.compute, passage.enter(0)
    hidden = brought(passage.hidden[0], compute)
    widths = {linear.in_features for linear in layer.linears.values()}
    sums = {width: GramSum(width, compute.device) for width in widths}
    rows = torch.ones(hidden.shape[0] * hidden.shape[1], max(widths)).to(hidden)

    def products() -> None:
        for width, total in sums.items():
            total.add(rows[:, :width].contiguous())

    # q/k/v, o and gate/up each need a Gram matrix of the hidden width; only down needs one of the widest.
    return seconds_of(lambda: layer.run(hidden, 0), compute), 2 * seconds_of(products, compute)


def _compile(backend: Backend, compute: Compute, config: TernaryConfig) -> None:
    """Compile what fits matrices, by a small fit: on a new machine this takes longer than a small run.

    What remains can then be estimated.
    """
    small = replace(config, block_size=16)
    W = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    ternarizer(backend, compute, small)(W, torch.eye(32, dtype=torch.float64))


def _time_block(backend: Backend, compute: Compute, config: TernaryConfig) -> float:
    """Time the ternarization of a block of columns on a device; launches cost more than arithmetic."""
    config = replace(config, refinement="none")
    columns = 8 * config.block_size
    W = torch.randn(columns, columns, device=compute.device)
    C = (W.T @ W).double()
    method = ternarizer(backend, compute, config)
    return seconds_of(lambda: method(W, C), compute) / 8


def _time_refinement(compute: Compute, config: TernaryConfig, shapes: list[torch.Size]) -> float:
    """Estimate the refinement on a device from its products by H, and as much again for everything else."""
    from gpu.refine import products  # needs CuPy and a device

    H = torch.ones(2048, 2048, dtype=torch.float64, device=compute.device)
    by_work = seconds_of(lambda: H @ H, compute) / len(H) ** 3
    return 2 * products(config) * by_work * sum(n * m**2 for n, m in shapes)
