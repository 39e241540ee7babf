"""Time fits of single matrices: the recipes by a backend, beside the paper's by the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from harness.backends import Backend
from harness.calibration.methods import ternarizer
from harness.compute import Compute, seconds_of
from harness.progress import Say, say_on_stdout
from harness.quantize.options import RECIPES

# Calibration tokens per column of a random Gram matrix: enough for one of full rank.
TOKENS = 2


def fit_speed(
    matrices: list[tuple[int, int]],
    backend: Backend,
    reference: Backend,
    compute: Compute,
    save: Callable[[dict[str, Any]], None],
    say: Say = say_on_stdout,
) -> dict[str, Any]:
    """Fit random matrices by every recipe, and by the paper's in the reference.

    Parameters
    ----------
    matrices : list of (rows, columns)
        Shapes.
    backend, reference : Backend
        The backend to measure, and `reference`.
    compute : Compute
        Device of the backend.
    save : callable
        Receives the results so far after every matrix.
    say : callable
        Prints a line after every matrix.

    Returns
    -------
    dict
        By shape: seconds by recipe, of the paper's recipe in the reference, and their ratios. All fits of a
        shape have the same weights and Gram matrix, with inputs that are correlated as real ones are.
    """
    results: dict[str, Any] = {}
    paper = RECIPES["paper"].config
    for rows, columns in matrices:
        W, C = random_layer(rows, columns)
        seconds = {}
        for name, recipe in RECIPES.items():
            method = ternarizer(backend, compute, recipe.config)
            method(W[:64].to(compute.device), C.to(compute.device))  # compiles
            moved = W.to(compute.device), C.to(compute.device)
            seconds[name] = seconds_of(partial(method, *moved), compute, warm_up=False)
        slow = ternarizer(reference, Compute(), paper)
        by_reference = seconds_of(partial(slow, W, C), Compute(), warm_up=False)
        results[f"{rows}x{columns}"] = {
            "backend": backend.name,
            "seconds": {name: round(spent, 5) for name, spent in seconds.items()},
            "seconds_of_paper_in_reference": round(by_reference, 5),
            "paper_times_faster_than_reference": round(by_reference / seconds["paper"], 2),
            "best_times_paper": round(seconds["best"] / seconds["paper"], 2),
            "best_times_paper_in_reference": round(seconds["best"] / by_reference, 2),
        }
        say(f"{rows}x{columns}: {results[f'{rows}x{columns}']}")
        save(results)
    return results


def random_layer(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random weights, and the Gram matrix of inputs whose spectrum falls as that of real inputs does."""
    generator = torch.Generator().manual_seed(rows + columns)
    W = 0.02 * torch.randn(rows, columns, generator=generator)
    spectrum = torch.arange(1, columns + 1) ** -0.5
    X = torch.randn(TOKENS * columns, columns, generator=generator) * spectrum
    rotation = torch.randn(columns, columns, generator=generator) / columns**0.5
    X = X @ rotation
    return W, (X.T @ X).double()
