"""Compare a backend with the reference on every matrix of a real model, given the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from harness import text
from harness.backends import Backend, load_backend
from harness.calibration.capture import capture_inputs
from harness.calibration.fits import FittedMatrix
from harness.calibration.layerwise import fit_layers
from harness.calibration.methods import Method, ternarizer
from harness.compute import Compute, compute_for
from harness.models.decoder import find_decoder_layers
from harness.models.loading import load_original
from harness.perplexity import measure_on
from harness.progress import Progress
from harness.verify.tolerances import OUTPUT_ERROR
from harness.windows import bos_of, calibration_windows, tokenize
from reference.aga import output_error
from reference.types import TernaryConfig, TernaryMatrix

# Calibration as in the demo: more tokens than any matrix of the embedded model has columns.
NSAMPLES, SEQLEN, EVALUATION_WINDOWS = 16, 512, 4


def compare_on_model(
    source: str | None, backend: Backend, nsamples: int = NSAMPLES, seqlen: int = SEQLEN
) -> dict[str, Any]:
    """Ternarize a model by the reference, and each of its matrices by the backend too.

    Calibration continues with the reference's matrices, so that both fit every matrix to the same inputs.
    Then the backend ternarizes the model alone, to measure its perplexity.

    Parameters
    ----------
    source : str or None
        As for `harness.models.loading.load_original`.
    backend : Backend
        The backend to compare, in its own precision.
    nsamples, seqlen : int
        Number of calibration windows, and tokens per window.

    Returns
    -------
    dict
        ``passed``: whether the output error of every matrix is within
        `harness.verify.tolerances.OUTPUT_ERROR` of the reference's; ``misses``: the matrices that are not;
        the largest difference and the smallest share of equal trits, with their matrices; and perplexities,
        which are not tested, because one tie rounded differently changes all later layers.
    """
    compute = compute_for(backend)
    reference = load_backend("reference")
    config = TernaryConfig()
    ours = ternarizer(backend, compute, config)

    def theirs(W: torch.Tensor, C: torch.Tensor) -> TernaryMatrix:
        return reference.ternarize(W.double().cpu(), C.cpu(), config)

    rows: list[dict[str, Any]] = []

    def compare(matrix: FittedMatrix) -> None:
        rows.append(_compare(matrix, backend.to_host(ours(matrix.weight, matrix.gram))))

    size = (nsamples, seqlen)
    name, before, of_reference = _ternarized(source, theirs, compute, *size, compare, "reference")
    _, _, of_backend = _ternarized(source, ours, compute, *size, lambda matrix: None, backend.name)
    misses = [row for row in rows if not abs(row["difference"]) <= OUTPUT_ERROR]
    return {
        "passed": not misses,
        "model": name,
        "device": compute.describe(),
        "tokens": f"{nsamples} x {seqlen}",
        "matrices": len(rows),
        "allowed": OUTPUT_ERROR,
        "largest_difference": max(rows, key=lambda row: abs(row["difference"])),
        "fewest_equal_trits": min(rows, key=lambda row: row["equal_trits"]),
        "mean_share_of_equal_trits": float(np.mean([row["equal_trits"] for row in rows])),
        "perplexity": {"original": before, "by the reference": of_reference, "by the backend": of_backend},
        "misses": misses,
    }


def _ternarized(
    source: str | None,
    method: Method,
    compute: Compute,
    nsamples: int,
    seqlen: int,
    take: Callable[[FittedMatrix], None],
    title: str,
) -> tuple[str, float, float]:
    """Fit every matrix of a model by a method; return the name, and the perplexity before and after."""
    original = load_original(source)
    decoder = find_decoder_layers(original.model, original.read)
    stream = text.read_text(text.BUILTIN, text.CALIBRATION)
    held_out = text.read_text(text.BUILTIN, text.EVALUATION)
    bos = bos_of(original.model, original.tokenizer)
    windows = calibration_windows(tokenize(stream, original.tokenizer), nsamples, seqlen, 0, bos)
    measure = (held_out, min(seqlen, 2048), EVALUATION_WINDOWS, compute)
    before = measure_on(original, *measure).value
    passage = capture_inputs(original.model, decoder, windows, compute)
    passage.place()
    with Progress(title, len(passage.calls), "layer") as step:
        for layer in fit_layers(passage, method):
            for matrix in layer.matrices:
                take(matrix)
            del layer, matrix  # free its Gram matrices before those of the next are allocated
            step()
    return original.name, before, measure_on(original, *measure).value


def _compare(matrix: FittedMatrix, ours: TernaryMatrix) -> dict[str, Any]:
    """Compare the reference's matrix with ours: output errors, computed on the host from stored values."""
    W, C = matrix.weight.double().cpu().numpy(), matrix.gram.cpu().numpy()
    expected, error = (output_error(W, result.dequantize(), C) for result in (matrix.result, ours))
    return {
        "matrix": matrix.name,
        "difference": error / expected - 1 if expected > 0 else float(error > 0),
        "equal_trits": float((ours.trits == matrix.result.trits).mean()),
    }
