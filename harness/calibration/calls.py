"""How decoder layers are called: the arguments beside the hidden states, for every window of text.

Most models pass masks and positions, the same for all windows. Some pass what they made from the text
(`Varying`), such as embeddings of the tokens for every layer, a mapping in which layers leave keys and
values for later ones (`Handed`), or what the layer before returned beside the hidden states (`Returned`),
such as which tokens it attended to.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from harness.compute import Compute

_AS_IT_IS = Compute(dtype=None)


@dataclass(frozen=True)
class Varying:
    """An argument that differs from window to window: its value for each."""

    values: list[torch.Tensor]


@dataclass(frozen=True)
class Handed:
    """An argument that layers write to and read from: a mapping of this class, one for every window."""

    kind: type


@dataclass(frozen=True)
class Returned:
    """An argument that an earlier layer returned after the hidden states: its index, and the place there."""

    layer: int
    place: int


# Where what layers return for later ones is kept in what is handed on.
_RETURNED = "returned after the hidden states"


@dataclass(frozen=True)
class LayerCall:
    """Arguments of a decoder layer other than the hidden states, and the form of its output.

    `extra` counts the values that the layer returns in a tuple after the hidden states; None if it returns
    the hidden states alone. `compute` is where `Varying` arguments are moved to once they are needed. A layer
    that is `skipped` is not called: it passes the hidden states on. If the layer with this `index` `returns`
    something to later ones, it is kept on the host.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    extra: int | None = None
    compute: Compute = _AS_IT_IS
    skipped: bool = False
    index: int = 0
    returns: bool = False

    @property
    def sources(self) -> set[int]:
        """The layers of which arguments were returned."""
        return {leaf.layer for leaf in _leaves((self.args, self.kwargs)) if isinstance(leaf, Returned)}

    def __call__(
        self, layer: nn.Module, hidden: torch.Tensor, window: int, handed: MutableMapping[Any, Any]
    ) -> torch.Tensor:
        """Run the layer on hidden states; they must have its device and dtype."""
        if self.skipped:
            return hidden
        args, kwargs = _at((self.args, self.kwargs), window, handed, self.compute)
        output = layer(hidden, *args, **kwargs)
        if not isinstance(output, tuple | list):
            return output
        if self.returns:
            # The layer may run again, on what it has read now.
            earlier = {i: kept for i, kept in handed.get(_RETURNED, {}).items() if i in self.sources}
            handed[_RETURNED] = {**earlier, self.index: moved(tuple(output[1:]), _AS_IT_IS)}
        return output[0]

    def to(self, compute: Compute) -> LayerCall:
        """Move the arguments to a device; cast floating-point ones (masks, rotary tables) to its dtype."""
        args, kwargs = moved((self.args, self.kwargs), compute)
        return replace(self, args=args, kwargs=kwargs, compute=compute)

    def mapping(self) -> MutableMapping[Any, Any]:
        """An empty mapping for the layers of one window to hand on."""
        kinds = [value.kind for value in (*self.args, *self.kwargs.values()) if isinstance(value, Handed)]
        return kinds[0]() if kinds else {}

    def bytes_of_windows(self) -> int:
        """Bytes that the arguments of one window take beside those of all windows."""
        tensors = [
            value.values[0] for value in _leaves((self.args, self.kwargs)) if isinstance(value, Varying)
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def marked(value: Any) -> Any:
    """Put `Handed` in the place of mappings other than dict, which layers write to."""
    if isinstance(value, tuple | list):
        return type(value)(map(marked, value))
    if isinstance(value, dict):
        return {key: marked(part) for key, part in value.items()}
    return Handed(type(value)) if isinstance(value, MutableMapping) else value


def differ(first: LayerCall, other: LayerCall) -> bool:
    """Whether two calls pass different tensors; arguments without tensors count as equal."""
    a, b = (list(_leaves((call.args, call.kwargs))) for call in (first, other))
    return len(a) != len(b) or any(not _same(x, y) for x, y in zip(a, b, strict=True))


def merged(windows: Iterator[LayerCall]) -> LayerCall:
    """Merge the calls of a layer for each window into one, with `Varying` arguments where they differ."""
    first = next(windows)
    leaves = list(_leaves((first.args, first.kwargs)))
    varying: dict[int, list[torch.Tensor]] = {}
    for count, call in enumerate(windows, 1):
        for place, leaf in enumerate(_leaves((call.args, call.kwargs))):
            if place in varying:
                varying[place].append(leaf)
            elif not _same(leaves[place], leaf):
                varying[place] = [leaves[place]] * count + [leaf]
    if not varying:
        return first
    values = iter(
        [Varying(varying[place]) if place in varying else leaf for place, leaf in enumerate(leaves)]
    )
    args, kwargs = _rebuilt((first.args, first.kwargs), values)
    return replace(first, args=args, kwargs=kwargs)


def moved(value: Any, compute: Compute) -> Any:
    """Move tensors to a device; cast floating-point ones to its dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(compute.device, compute.dtype if value.is_floating_point() else None)
    if isinstance(value, tuple | list):
        return type(value)(moved(v, compute) for v in value)
    if isinstance(value, MutableMapping):
        kind: Any = type(value)
        return kind({k: moved(v, compute) for k, v in value.items()})
    return value


def _at(value: Any, window: int, handed: MutableMapping[Any, Any], compute: Compute) -> Any:
    """The arguments of one window."""
    if isinstance(value, Varying):
        return moved(value.values[window], compute)
    if isinstance(value, Handed):
        return handed
    if isinstance(value, Returned):
        return moved(handed[_RETURNED][value.layer][value.place], compute)
    if isinstance(value, tuple | list):
        return type(value)(_at(v, window, handed, compute) for v in value)
    if isinstance(value, dict):
        return {k: _at(v, window, handed, compute) for k, v in value.items()}
    return value


def _leaves(value: Any) -> Iterator[Any]:
    """Everything in nested arguments that is no tuple, list or dict, in order."""
    if isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


def _rebuilt(value: Any, leaves: Iterator[Any]) -> Any:
    """Nested arguments of the same form, with other leaves."""
    if isinstance(value, tuple | list):
        return type(value)([_rebuilt(part, leaves) for part in value])
    if isinstance(value, dict):
        return {key: _rebuilt(part, leaves) for key, part in value.items()}
    return next(leaves)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return not (isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor))
