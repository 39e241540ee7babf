"""Measure tokens per second of random models in real shapes, dense and ternary, in the same run."""

from __future__ import annotations

from typing import Any

import torch

from harness.benchmark.shapes import SHAPES, make_model
from harness.comparison.speed import Lengths, fill, generation_rates, make_ternary, rounded
from harness.compute import Compute, dtype_name
from harness.models.streamed import attach_empty_layers
from harness.quantize.options import RECIPES
from harness.ternary.kernels.launches import use_kernels

DTYPE = torch.bfloat16


def generation_speed(
    shape: str,
    compute: Compute,
    layers: int | None = None,
    lengths: Lengths = Lengths(),
    recipe: str = "best",
) -> dict[str, Any]:
    """Measure tokens per second of prefill, of decoding, and of both, at batch size 1.

    Both models have random weights and run ``generate`` with a static cache. On a GPU, transformers
    compiles decoding with CUDA graphs; it may run the prefill without.

    Parameters
    ----------
    shape : str
        One of `harness.benchmark.shapes.SHAPES`.
    compute : Compute
        Device that runs the models.
    layers : int, optional
        Number of decoder layers; by default all.
    lengths : Lengths
        Tokens in the prompt, and tokens to generate.
    recipe : str
        The recipe whose block size, grid and order the ternary weights have.

    Returns
    -------
    dict
        For the ``dense`` and the ``ternary`` model, tokens per second of ``prefill``, ``decode`` and
        ``both``, and bytes of the model; and the ratios of the two.
    """
    figures = {
        kind: generation_rates(random_network(shape, layers, stored, compute), compute, lengths)
        for kind, stored in (("dense", None), ("ternary", recipe))
    }
    dense, ternary = figures["dense"], figures["ternary"]
    return {
        "shape": shape,
        "layers": SHAPES[shape].depth(layers),
        "layers_of_the_model": SHAPES[shape].layers,
        "tokens": f"{lengths.prefill} read, {lengths.decode} written",
        "dtype": dtype_name(DTYPE),
        "device": compute.describe(),
        "recipe": recipe,
        **figures,
        "ternary_over_dense": {figure: rounded(ternary[figure] / dense[figure]) for figure in dense},
    }


def random_network(shape: str, layers: int | None, recipe: str | None, compute: Compute) -> Any:
    """Make a model of a shape with random weights, directly on its device; ternary if there is a recipe."""
    depth = SHAPES[shape].depth(layers)
    model = make_model(shape, depth, DTYPE)
    decoder = attach_empty_layers(model, depth)
    if recipe is not None:
        make_ternary(model, list(decoder.named_linears()), RECIPES[recipe].config, DTYPE)
    for layer in decoder.layers:
        layer.to_empty(device=compute.device)
        for module in layer.modules():
            fill(module)
    model.to(compute.device)
    if recipe is not None:
        use_kernels(model)
    return model
