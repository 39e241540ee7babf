"""Experts of a mixture as matrices of their own.

transformers keeps the matrices of all experts of a layer in 3-D parameters (`use_experts_implementation`).
`Experts` takes their place, with one nn.Linear for each matrix: ``3.gate_up_proj`` is what expert 3 reads its
tokens with, ``3.down_proj`` what it writes with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import nn

DOWN = "down_proj"

# Multiplies the inputs of some matrices, each by its own.
Multiply = Callable[[list[nn.Module], list[torch.Tensor]], list[torch.Tensor]]


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds experts as 3-D parameters, with the attributes that transformers gives them."""
    count, down = getattr(module, "num_experts", None), module._parameters.get(DOWN)
    up = module._parameters.get(up_name(module))
    known = hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    return known and all(p is not None and p.ndim == 3 and len(p) == count for p in (up, down))


def up_name(module: nn.Module) -> str:
    """Name of the projection that reads a token: with a gate, both are one matrix."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


class Expert(nn.Module):
    """One expert: the matrix that reads tokens, and ``down_proj``. `Experts` computes what is in between."""


def one_by_one(matrices: list[nn.Module], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Multiply by one matrix after the other."""
    return [matrix(x) for matrix, x in zip(matrices, inputs, strict=True)]


class Experts(nn.Module):
    """Experts of a layer, each with matrices of its own.

    Parameters
    ----------
    fused : nn.Module
        The module of transformers, for which `is_fused` holds. Its weights are shared, not copied.
    multiply : callable
        Multiplies by the matrices of one kind of several experts.

    Attributes
    ----------
    kind : type
        Class of the fused module; its `_apply_gate` is used.
    every : bool
        Whether a pass also runs the experts that no token is routed to, on no rows, so that calibration
        meets every matrix once.
    """

    # What the fused module has too; classes of transformers may have more.
    num_experts: int
    has_gate: bool
    act_fn: Any
    post_expert_norm: Any

    def __init__(self, fused: Any, multiply: Multiply = one_by_one) -> None:
        super().__init__()
        self.kind: Any = type(fused)
        self.multiply = multiply
        self.every = False
        _take_over(fused, self)
        transposed = bool(getattr(fused, "is_transposed", False))
        for number in range(fused.num_experts):
            expert = Expert()
            for name in (up_name(fused), DOWN):
                weight, bias = getattr(fused, name)[number], getattr(fused, f"{name}_bias", None)
                expert.add_module(name, _linear(weight.T if transposed else weight, bias, number))
            self.add_module(str(number), expert)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Map (tokens, width) to (tokens, width): the weighted sum of the experts of each token.

        `top_k_index` and `top_k_weights` are (tokens, k). An index beyond the experts stands for none. Sums
        are over k in order, whatever experts there are, as in transformers' batched implementations.
        """
        pairs = self.routed(top_k_index)
        used = [number for number, own in enumerate(pairs) if len(own) or self.every]
        inner = self.inner(hidden_states, top_k_index.shape[-1], {number: pairs[number] for number in used})
        outputs = [*self.products(DOWN, inner).values()]
        outer = hidden_states.new_zeros(top_k_index.numel(), hidden_states.shape[-1])
        if outputs:
            outer[torch.cat([pairs[number] for number in used])] = torch.cat(outputs).to(outer.dtype)
        if getattr(self, "has_post_expert_norm", False):
            outer = self.post_expert_norm(outer)
        weighted = outer * top_k_weights.reshape(-1, 1)
        return weighted.view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)

    def routed(self, top_k_index: torch.Tensor) -> list[torch.Tensor]:
        """Places in `top_k_index`, read row by row, of each expert's tokens, in the order of the tokens."""
        chosen = top_k_index.reshape(-1)
        counts = torch.bincount(chosen, minlength=self.num_experts)[: self.num_experts].tolist()
        return list(chosen.argsort(stable=True)[: sum(counts)].split(counts))

    def inner(
        self, hidden_states: torch.Tensor, k: int, pairs: dict[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """What some experts pass to ``down_proj``, (tokens of the expert, columns), by their numbers.

        Parameters
        ----------
        hidden_states : (tokens, width) tensor
            What the experts read.
        k : int
            Experts of a token.
        pairs : dict of int to tensor
            The tokens of these experts, as `routed` gives them.
        """
        # All experts read before the first writes: matrices of a kind share a pass in calibration.
        rows = {number: hidden_states[own // k] for number, own in pairs.items()}
        read = self.products(up_name(self), rows)
        between = self.kind._apply_gate if self.has_gate else lambda self, x: self.act_fn(x)
        return {number: between(self, x) for number, x in read.items()}

    def products(self, part: str, rows: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Multiply rows by the matrices of one kind of some experts, by their numbers."""
        matrices: list[nn.Module] = [self.matrix(number, part) for number in rows]
        return dict(zip(rows, self.multiply(matrices, [*rows.values()]), strict=True))

    def matrix(self, number: int, part: str) -> nn.Linear:
        """A matrix of an expert."""
        return cast(nn.Linear, getattr(getattr(self, str(number)), part))

    def fuse(self) -> nn.Module:
        """Make the module of transformers again, with copies of the weights."""
        fused = self.kind.__new__(self.kind)
        nn.Module.__init__(fused)
        _take_over(self, fused)
        experts = [getattr(self, str(number)) for number in range(self.num_experts)]
        for name in (up_name(self), DOWN):
            linears = [getattr(expert, name) for expert in experts]
            weight = torch.stack([linear.weight for linear in linears])
            weight = weight.mT.contiguous() if getattr(self, "is_transposed", False) else weight
            fused.register_parameter(name, nn.Parameter(weight))
            if linears[0].bias is not None:
                biases = torch.stack([linear.bias for linear in linears])
                fused.register_parameter(f"{name}_bias", nn.Parameter(biases))
        return fused.train(self.training)


class Place(NamedTuple):
    """Where a matrix of an expert is: name of the `Experts` in the layer, number of the expert, own name."""

    experts: str
    number: int
    part: str


def place_of(layer: nn.Module, name: str) -> Place | None:
    """Find the expert that a matrix of a layer belongs to; None for a matrix of no expert."""
    expert, _, part = name.rpartition(".")
    experts, _, number = expert.rpartition(".")
    if not experts or not isinstance(layer.get_submodule(experts), Experts):
        return None
    return Place(experts, int(number), part) if number.isdigit() else None


def family(layer: nn.Module, name: str) -> str | None:
    """Name that the matrices of one kind of all experts share; None for a matrix of no expert."""
    place = place_of(layer, name)
    return None if place is None else f"{place.experts}.*.{place.part}"


def _take_over(source: nn.Module, target: nn.Module) -> None:
    """Give a module the settings and the other modules of another one, but for the experts' matrices."""
    own = vars(nn.Module()).keys() | {"kind", "every", "multiply"}
    for name, value in vars(source).items():
        if name not in own:
            setattr(target, name, value)
    matrices = {f"{name}{part}" for name in (up_name(source), DOWN) for part in ("", "_bias")}
    for name, parameter in source.named_parameters(recurse=False):
        if name not in matrices:
            target.register_parameter(name, parameter)
    for name, buffer in source.named_buffers(recurse=False):
        target.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)
    for name, child in source.named_children():
        if not isinstance(child, Expert):
            target.add_module(name, child)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, number: int) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach()[number], requires_grad=False)
    return linear
