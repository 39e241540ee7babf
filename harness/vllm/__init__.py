"""Ternary checkpoints in vLLM: with this package installed, ``vllm serve DIR`` reads them.

vLLM finds `register` by the entry point ``vllm.general_plugins`` of this package, and calls it in each of its
processes.

Reading order:

    shards          what one rank holds of the matrices that vLLM merges into a layer; knows no vLLM
    linear          a linear layer in vLLM: loads by `shards`, multiplies by packed trits
    embedding       an embedding or LM head in 8 bits
    quantization    which layer of a model gets which of them
"""

from __future__ import annotations


def register() -> None:
    """Make vLLM know ``quant_method`` "pt2_llm"."""
    import harness.vllm.quantization  # noqa: F401 - registers on import; a process may do so twice
