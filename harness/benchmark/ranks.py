"""Compare processes that share a quantization with one process, and count what they send and compute."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.benchmark.shapes import SHAPES, Shape
from harness.calibration.gram import PANEL_ROWS
from harness.calibration.owners import deal, fit_cost
from harness.errors import UserError
from harness.progress import say_on_stderr
from harness.quantize.options import RECIPES, WEIGHTS, Recipe

# Matrices that read one input, in the order of their use; o and down add to the residual stream.
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
WRITERS = ("o", "down")


def rank_speed(run: Sequence[str], processes: int, rounds: int) -> dict[str, Any]:
    """Time one process with as many threads, and processes with one thread each, in turn.

    Parameters
    ----------
    run : sequence of str
        Arguments of ``python -m harness.quantize``, without --out.
    processes : int
        Number of processes, and of threads of the one.
    rounds : int
        Runs of each; they alternate, so that a busy machine slows both alike.

    Returns
    -------
    dict
        Median seconds of the layers and of whole runs, `ratio` of the layers' seconds (median over rounds),
        and the bytes between processes of every layer.

    Raises
    ------
    UserError
        If a run fails; it has printed why.
    """
    alone, shared, sent = [], [], []
    for number in range(1, rounds + 1):
        say_on_stderr(f"round {number} of {rounds}")
        alone.append(_timed(run, 1, processes)[:2])
        *seconds, sent = _timed(run, processes, 1)
        shared.append(seconds)
    return {
        "one_process": {"threads": processes, **_medians(alone)},
        "processes": {"processes": processes, "threads_of_each": 1, **_medians(shared)},
        "ratio": round(statistics.median(b[0] / a[0] for a, b in zip(alone, shared, strict=True)), 3),
        "bytes_between_processes_by_layer": sent,
    }


def _timed(run: Sequence[str], processes: int, threads: int) -> tuple[Any, ...]:
    """Seconds of the layers and of a whole run, and the bytes between processes by layer."""
    launcher = [] if processes == 1 else ["torch.distributed.run", "--standalone", "--nproc-per-node"]
    launcher += [] if processes == 1 else [str(processes), "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", *launcher, "harness.quantize", *run, "--out", str(out)]
        began = time.perf_counter()
        if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode:
            raise UserError("the quantization failed; see the message above")
        spent = time.perf_counter() - began
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    sent = [layer.get("bytes_between_processes", 0) for layer in report["layers"]]
    return report["seconds"]["layers"], spent, sent


def _medians(runs: Sequence[Any]) -> dict[str, float]:
    layers, whole = (round(statistics.median(seconds), 1) for seconds in zip(*runs, strict=True))
    return {"seconds_of_layers": layers, "seconds": whole}


def rank_counts(shape: str, recipe: str, nsamples: int, seqlen: int, sizes: Sequence[int]) -> dict[str, Any]:
    """Count what each number of processes sends and computes in a layer of a model; nothing is measured."""
    model, settings = SHAPES[shape], RECIPES[recipe]
    return {
        str(size): {
            "gigabytes_between_processes_a_layer": round(layer_bytes(model, settings, size) / 1e9, 3),
            "teraflops_a_layer_of_each": round(
                _flops(model, settings, -(-nsamples // size) * seqlen) / 1e12, 1
            ),
            "share_of_the_fits_of_the_busiest": _busiest(model, settings, size),
        }
        for size in sizes
    }


def layer_bytes(shape: Shape, recipe: Recipe, size: int) -> int:
    """Count the bytes of tensors that processes send each other in one layer.

    Notes
    -----
    By `calibration.owners` and `calibration.fits`: sums go to one owner of a group in pairs of float64, and
    from it in float64 to the owners of the other matrices of the group; then each matrix goes to all.
    """
    total = 0
    for batch in _batches(recipe):
        shapes = {name: _shape(shape, name) for group in batch for name in group}
        owners = deal(shapes, size)
        for group in batch:
            rows, columns = shapes[group[0]]
            entries = sum(
                min(PANEL_ROWS, columns - first) * min(first + PANEL_ROWS, columns)
                for first in range(0, columns, PANEL_ROWS)
            )
            if recipe.targets != WEIGHTS:
                lost = rows * columns if group[0] in WRITERS else columns**2
                entries += lost
            total += entries * (16 * (size - 1) + 8 * (len({owners[name] for name in group}) - 1))
        total += (size - 1) * sum(_stored(rows, columns, recipe) for rows, columns in shapes.values())
    return total


def _stored(rows: int, columns: int, recipe: Recipe) -> int:
    """Bytes of one matrix between processes: trits, permutation, alpha and mu."""
    blocks = -(-columns // recipe.config.block_size)
    coded = recipe.config.grid == "int8"
    grid = rows * blocks + 2 * rows + 2 * blocks if coded else 2 * rows * blocks
    return rows * columns + 8 * columns + (1 if recipe.config.symmetric else 2) * grid


def _flops(shape: Shape, recipe: Recipe, tokens: int) -> int:
    """Operations of passes and products of one process in one layer, without attention's own products."""
    weights = sum(rows * columns for rows, columns in (_shape(shape, n) for g in GROUPS for n in g))
    # Collecting inputs once, or once for each group; the outputs; and a pass of the original layer.
    passes = (len(GROUPS) if recipe.true_sequential else 1) + 1 + (recipe.targets != WEIGHTS)
    products = 0
    for group in GROUPS:
        rows, columns = _shape(shape, group[0])
        products += columns**2
        if recipe.targets != WEIGHTS:
            products += rows * columns if group[0] in WRITERS else columns**2
    return 2 * tokens * (passes * weights + products)


def _busiest(shape: Shape, recipe: Recipe, size: int) -> float:
    """Share of all fits of a layer that must be waited for: those of the busiest process of every batch."""
    waited = total = 0
    for batch in _batches(recipe):
        shapes = {name: _shape(shape, name) for group in batch for name in group}
        busy = [0] * size
        for name, rank in deal(shapes, size).items():
            busy[rank] += fit_cost(*shapes[name])
        waited, total = waited + max(busy), total + sum(busy)
    return round(waited / total, 3)


def _batches(recipe: Recipe) -> list[tuple[tuple[str, ...], ...]]:
    """Groups of matrices that are fitted at the same time."""
    return [(group,) for group in GROUPS] if recipe.true_sequential else [GROUPS]


def _shape(shape: Shape, name: str) -> tuple[int, int]:
    if name in ("k", "v"):
        return shape.groups * shape.head_width, shape.hidden
    if name in ("gate", "up"):
        return shape.intermediate, shape.hidden
    return shape.hidden, shape.intermediate if name == "down" else shape.hidden
