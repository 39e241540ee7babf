"""The ternary tensors of a file: most are a matrix of the checkpoint, those of experts are several.

llama.cpp and mlx_lm keep the matrices of one kind of all experts of a layer in one tensor, (experts, n, m).
In the checkpoint every expert has its own, and gate_proj and up_proj are the first and the second half of the
rows of ``gate_up_proj``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from harness.export.source import Stored
from harness.models.experts import Experts
from reference.types import TernaryMatrix

GATE_UP = "gate_up_proj"


@dataclass(frozen=True)
class TernaryTensor:
    """A tensor of a file.

    Attributes
    ----------
    name : str
        Name of its module; for experts, ``EXPERTS.gate_proj``, as if they were one module.
    modules : tuple of str
        Matrices of the checkpoint it is made of: one, or one of every expert.
    first : int
        The first row taken of each.
    shape : tuple of int
        (n, m), or (experts, n, m).
    """

    name: str
    modules: tuple[str, ...]
    first: int
    shape: tuple[int, ...]

    def matrices(self, stored: Stored) -> Iterator[TernaryMatrix]:
        """Read the matrices, one after the other."""
        rows = slice(self.first, self.first + self.shape[-2])
        for module in self.modules:
            whole = stored.matrix(module)
            trits, scale, shift = (part[rows] for part in (whole.trits, whole.scale, whole.shift))
            yield replace(whole, trits=trits, scale=scale, shift=shift)


def ternary_tensors(stored: Stored) -> list[TernaryTensor]:
    """List the ternary tensors of a file, in the order of the checkpoint's layers."""
    groups = {name for name, module in stored.model.named_modules() if isinstance(module, Experts)}
    found: list[TernaryTensor] = []
    of_experts: dict[str, list[str]] = {}
    for module, layer in stored.layers.items():
        expert, _, own = module.rpartition(".")
        group = expert.rpartition(".")[0]
        if group in groups:
            of_experts.setdefault(f"{group}.{own}", []).append(module)
        else:
            found.append(TernaryTensor(module, (module,), 0, (layer.out_features, layer.in_features)))
    for name, modules in of_experts.items():
        group, _, own = name.rpartition(".")
        layer = stored.layers[modules[0]]
        parts = {"gate_proj": 0, "up_proj": layer.out_features // 2} if own == GATE_UP else {own: 0}
        shape = (len(modules), layer.out_features // len(parts), layer.in_features)
        found += [
            TernaryTensor(f"{group}.{part}", tuple(modules), first, shape) for part, first in parts.items()
        ]
    return found
