"""The programs people run: quantize, evaluate, verify and benchmark ternary language models.

`harness.load` reads a ternary checkpoint back. Importing this package imports neither torch nor
transformers.

Reading order, from the ground up; a module imports only what stands above it here:

    errors, files, cli, machine   messages, JSON, command lines, facts about this machine
    progress                      bars, or lines where there is no terminal
    backends, compute             who fits matrices, and where layers run
    models/                       an original model: its folder, loading it, its decoder layers
    text                          calibration and evaluation text
    calibration/                  text in, fitted matrices out, layer by layer
    ternary/                      a ternary model in torch and on disk
    perplexity, hf                measuring a model; transformers reads checkpoints
    evaluate, generate, inspect   programs of one file
    quantize/, export/, verify/   programs of several
    benchmark/, hardware          programs that measure the others

Words used throughout:

    trit           -1, 0 or +1; t in a weight alpha * t + mu
    block          neighbouring columns (128) that share alpha and mu in every row
    grid           alpha and mu of a block, or what they are stored in (float16 or int8 codes)
    permutation    original column of every stored trit, where columns were reordered
    Gram matrix    C = XᵀX of a matrix's calibration inputs X
    window         one sequence of calibration or evaluation tokens
    hidden states  what decoder layers pass on, kept between layers for every window
    backend        a package with the functions of reference/: `reference` or `gpu`
    shard          one safetensors file of a checkpoint; decoder layers have one each
    packed         as trits in bytes (on disk) or in the kernels' words (on a device)
    dense          as ordinary weights, dequantized
"""

from __future__ import annotations

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from harness.hf import load

        return load
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
