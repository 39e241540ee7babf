"""Experts of a mixture as matrices of their own.

transformers keeps the matrices of all experts of a layer in 3-D parameters.
`Experts` takes their place, with one nn.Linear for each matrix: ``3.gate_up_proj`` is what expert 3 reads its
tokens with, ``3.down_proj`` what it writes with. `SlotExperts` are those of Llama 4, which are called in
another way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import nn

DOWN = "down_proj"

# Multiplies the inputs of some matrices, each by its own.
Multiply = Callable[[list[nn.Module], list[torch.Tensor]], list[torch.Tensor]]

# Classes of transformers whose experts read a row for every expert and token (`SlotExperts`).
SLOTS = ("Llama4TextExperts",)


def separated(module: nn.Module) -> type[Experts] | None:
    """Return the class that takes the place of a module; None if it holds no experts as 3-D parameters.

    Experts are known by the method that transformers gives them for what stands between their matrices, or by
    their class.
    """
    count, down = getattr(module, "num_experts", None), module._parameters.get(DOWN)
    up = module._parameters.get(up_name(module))
    if not all(p is not None and p.ndim == 3 and len(p) == count for p in (up, down)):
        return None
    if type(module).__name__ in SLOTS:
        return SlotExperts
    return Experts if hasattr(module, "_apply_gate") else None


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
        The module of transformers, whose place `separated` gives to this class. Its weights are shared, not
        copied.
    multiply : callable
        Multiplies by the matrices of one kind of several experts.

    Attributes
    ----------
    kind : type
        Class of the fused module; its `_apply_gate` is used.
    every : bool
        Whether a pass also runs the experts that no token is routed to, on no rows, so that calibration
        meets every matrix once.
    per_pair : bool
        Whether a row of what is read belongs to one expert of a token, not to all of them.
    """

    per_pair = False

    # What the fused module has too; classes of transformers may have more, and leave out what is usual.
    num_experts: int
    has_gate: bool = True
    is_transposed: bool = False
    act_fn: Any
    post_expert_norm: Any

    def __init__(self, fused: Any, multiply: Multiply = one_by_one) -> None:
        super().__init__()
        self.kind: Any = type(fused)
        self.multiply = multiply
        self.every = False
        _take_over(fused, self)
        for number in range(fused.num_experts):
            expert = Expert()
            for name in (up_name(fused), DOWN):
                weight, bias = getattr(fused, name)[number], getattr(fused, f"{name}_bias", None)
                expert.add_module(name, _linear(weight.T if self.is_transposed else weight, bias, number))
            self.add_module(str(number), expert)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Map (tokens, width) to (tokens, width): the weighted sum of the experts of each token.

        `top_k_index` and `top_k_weights` are (tokens, k). An index beyond the experts stands for none. Sums
        are over k in order, whatever experts there are, as in transformers' batched implementations.
        """
        outer = self.outer(hidden_states, top_k_index)
        if getattr(self, "has_post_expert_norm", False):
            outer = self.post_expert_norm(outer)
        weighted = outer * top_k_weights.reshape(-1, 1)
        return weighted.view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)

    def reading(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is read, given the arguments of a call.

        Returns
        -------
        (rows, width) tensor
            A row for each token; with `per_pair`, for each pair of a token and one of its experts.
        two (tokens, k) tensors
            The experts and routing weights of each token.
        """
        return arguments

    def written(self, output: torch.Tensor) -> torch.Tensor:
        """The sums of the experts of each token, (tokens, width), given what a call returned."""
        return output

    def outer(self, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """What each expert of a token writes, (tokens * k, width), before weights and sums.

        `rows` and `index` are as `reading` gives them.
        """
        pairs = self.routed(index)
        used = [number for number, own in enumerate(pairs) if len(own) or self.every]
        inner = self.inner(rows, index, {number: pairs[number] for number in used})
        outputs = [*self.products(DOWN, inner).values()]
        outer = rows.new_zeros(index.numel(), rows.shape[-1])
        if outputs:
            outer[torch.cat([pairs[number] for number in used])] = torch.cat(outputs).to(outer.dtype)
        return outer

    def routed(self, top_k_index: torch.Tensor) -> list[torch.Tensor]:
        """Places in `top_k_index`, read row by row, of each expert's tokens, in the order of the tokens."""
        chosen = top_k_index.reshape(-1)
        counts = torch.bincount(chosen, minlength=self.num_experts)[: self.num_experts].tolist()
        return list(chosen.argsort(stable=True)[: sum(counts)].split(counts))

    def inner(
        self, rows: torch.Tensor, index: torch.Tensor, pairs: dict[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """What some experts pass to ``down_proj``, (tokens of the expert, columns), by their numbers.

        Parameters
        ----------
        rows, index : tensors
            What the experts read, as `reading` gives it.
        pairs : dict of int to tensor
            The tokens of these experts, as `routed` gives them.
        """
        # All experts read before the first writes: matrices of a kind share a pass in calibration.
        own_rows = {number: rows[self.rows_of(own, index)] for number, own in pairs.items()}
        return {n: self.between(x) for n, x in self.products(up_name(self), own_rows).items()}

    def rows_of(self, pairs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Places of pairs among the rows that are read."""
        return pairs if self.per_pair else pairs // index.shape[-1]

    def between(self, read: torch.Tensor) -> torch.Tensor:
        """What stands between the two matrices of an expert."""
        return self.kind._apply_gate(self, read) if self.has_gate else self.act_fn(read)

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
            weight = weight.mT.contiguous() if self.is_transposed else weight
            fused.register_parameter(name, nn.Parameter(weight))
            if linears[0].bias is not None:
                biases = torch.stack([linear.bias for linear in linears])
                fused.register_parameter(f"{name}_bias", nn.Parameter(biases))
        return fused.train(self.training)


class SlotExperts(Experts):
    """Experts that read a row for every expert and token, zeros where a token is not routed to an expert.

    In Llama 4 routing scores multiply what experts read, and outputs are added up as they are. The rows of
    zeros give zeros; they are left out here, so that they are no tokens of an expert in calibration, and cost
    nothing.
    """

    is_transposed = True
    per_pair = True

    def forward(self, slots: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Map (experts * tokens, width), expert by expert, to the same shape."""
        rows, index, _ = self.reading(slots)
        tokens = len(index)
        places = index * tokens + torch.arange(tokens, device=index.device)[:, None]
        # The last rows are those of no expert.
        filled = slots.new_zeros(len(slots) + tokens, slots.shape[-1])
        filled[places.reshape(-1)] = self.outer(rows, index)
        return filled[: len(slots)]

    def reading(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is read; a token's experts come in the order of their scores, the largest first."""
        (slots,) = arguments
        by_token = slots.unflatten(0, (self.num_experts, -1)).transpose(0, 1)
        sizes = by_token.abs().amax(dim=-1)
        k = max(int((sizes != 0).sum(dim=1).max()), 1)
        largest, index = sizes.topk(k)
        rows = by_token.take_along_dim(index[..., None], dim=1).flatten(0, 1)
        return rows, index.masked_fill(largest == 0, self.num_experts), torch.ones_like(largest)

    def written(self, output: torch.Tensor) -> torch.Tensor:
        """The sums of the experts of each token, as the caller takes them."""
        return output.unflatten(0, (self.num_experts, -1)).sum(dim=0)

    def between(self, read: torch.Tensor) -> torch.Tensor:
        """The gate and what it multiplies are the halves of what was read."""
        gate, up = read.chunk(2, dim=-1)
        return up * self.act_fn(gate)


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
