"""The programs people run: quantize, evaluate, verify and benchmark ternary language models.

`harness.load` reads a ternary checkpoint back. Importing this package imports neither torch nor
transformers.

Reading order, bottom-up; a module imports only modules listed above it:

    errors, words                 messages
    plotting                      what all plots share
    streams, signals              stdout and stderr; Ctrl-C and SIGTERM
    files, cli, machine           JSON, command lines, facts about this machine
    cpu/                          the backend for CPUs
    progress                      progress bars, or lines where there is no terminal
    distributed/                  several processes that share a run
    page/                         the report of a run as a page
    backends, compute             which package fits matrices; which device runs layers
    models/                       the original model: its folder, loading, decoder layers
    text/, windows                calibration and evaluation text, and the windows cut from it
    calibration/                  from text to fitted matrices, layer by layer
    runtimes/                     what llama.cpp and mlx_lm compute, and their formats hold
    ternary/                      a ternary model in torch and on disk
    perplexity, divergence        measure a model on text
    zeroshot/, hf                 measure it on tasks; load checkpoints in transformers
    vllm/                         load checkpoints in vLLM, which imports this by itself
    evaluate, inspect, report     single-file programs
    quantize/, export/, verify/   programs with a folder
    generate/, serve/             text from a model: at a terminal, over HTTP
    compare                       checkpoints side by side
    comparison/                   what methods make of one model, on the same texts
    benchmark/, hardware          programs that measure the others
    reproduce/                    the paper's tables and figures on any model
    architectures/                every architecture of transformers at a small size

Words used throughout:

    trit           -1, 0 or +1; t in a weight alpha * t + mu
    block          adjacent columns (128 by default) that share one alpha and mu per row
    grid           alpha and mu of a block, or the type that stores them (float16 or int8 codes)
    permutation    original column of each stored trit, if columns were reordered
    Gram matrix    C = XᵀX of a matrix's calibration inputs X
    rank           one of several processes that share a run, or its number
    window         one sequence of calibration or evaluation tokens
    hidden states  output of one decoder layer and input of the next, kept for every window
    backend        a package that implements the functions of reference/: `reference`, `cpu` or `gpu`
    shard          one safetensors file of a checkpoint; each decoder layer has its own. Of windows:
                   neighbours whose products are summed in float32
    packed         stored as trits, in bytes (on disk) or in the kernels' words (on a device)
    dense          stored as ordinary weights, dequantized
"""

from __future__ import annotations

import os
import sys
from typing import Any

from harness.signals import end_at_once

__all__ = ["load"]

# torch's threads spin while they wait, by default for a millisecond: on a busy machine, and beside threads
# that are not torch's, they keep work from the cores. OpenMP reads this when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# Of what `harness.distributed` tells in a line, torch's C++ warns in every process, with its stack.
if os.environ.get("WORLD_SIZE", "1") != "1":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# "-m" as long as Python locates the module to run: python -m harness.PROGRAM, whose imports take seconds.
if sys.argv[:1] == ["-m"]:
    end_at_once()


def __getattr__(name: str) -> Any:
    if name == "load":
        from harness.hf import load

        return load
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
