"""From the tensors of files to those of a model, where they have other names or are stored in parts.

transformers renames, merges and splits tensors as it loads a model. Its modules hold the experts of a layer
in one tensor; most folders have a tensor for each expert and projection. The tables are transformers' own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from harness.errors import UserError
from harness.models.decoder import Reader


@dataclass
class _Parts:
    """Tensors of the files that give one or more tensors of a model, and what merges or splits them."""

    converter: Any = None
    # Names in the files, each with the pattern of the converter that it fits.
    sources: list[tuple[str, str]] = field(default_factory=list)

    @property
    def are_merged(self) -> bool:
        """Whether a tensor for each expert is stacked."""
        steps = [] if self.converter is None else self.converter.operations
        return any(isinstance(step, MergeModulelist) for step in steps)


class Conversion:
    """Where the tensors of a model come from in its files.

    Parameters
    ----------
    model : PreTrainedModel
        The model as transformers makes it; its parameters may be on torch's meta device.
    stored : iterable of str
        Names of the tensors in the files.
    """

    def __init__(self, model: Any, stored: Iterable[str]) -> None:
        self._model = model
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        rules = conversion_mapping.get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        base = model.base_model_prefix
        self._parts: dict[str, _Parts] = defaultdict(_Parts)
        self._first: dict[
            str, str
        ] = {}  # a tensor of the model -> the first one that comes of the same parts
        for name in sorted(stored, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, renamings, converters, base, shapes)
            if renamed not in shapes and name in shapes:
                renamed, pattern = name, None
            if renamed not in shapes:
                continue
            parts = self._parts[renamed]
            parts.sources.append((name, pattern or name))
            targets = [renamed]
            if pattern is not None:
                parts.converter = by_pattern[pattern]
                first, *others = parts.converter.target_patterns
                targets += [renamed.replace(first, other) for other in others]
            self._first |= dict.fromkeys(targets, renamed)
        self._shapes = {name: shapes[name] for name in self._first if name in shapes}

    def require(self, names: Iterable[str], folder: object) -> None:
        """Refuse files that lack a tensor, or one of the parts that a tensor is merged from.

        Raises
        ------
        UserError
            If so; the message names the tensor.
        """
        for name in sorted(names):
            if name not in self._first:
                raise UserError(
                    f"{folder} is too large to load as a whole, and cannot be read layer by layer: "
                    f"its files have no tensor {name}"
                )
            parts = self._parts[self._first[name]]
            if not parts.are_merged:
                continue
            counts, whole = Counter(pattern for _, pattern in parts.sources), self._shapes[name][0]
            for pattern in parts.converter.source_patterns:
                if counts[pattern] != whole:
                    raise UserError(
                        f"{folder} is damaged: {name} is merged from {whole} tensors {pattern}, and its "
                        f"files have {counts[pattern]} of them"
                    )

    def reader(self, read: Reader) -> Reader:
        """Return a reader by the names of the model, given one by the names of the files."""

        def read_converted(names: list[str]) -> dict[str, torch.Tensor]:
            firsts = dict.fromkeys(self._first[name] for name in names)
            found: dict[str, torch.Tensor] = {}
            for first in firsts:
                found |= self._convert(first, read)
            return {name: found[name] for name in names}

        return read_converted

    def _convert(self, first: str, read: Reader) -> dict[str, torch.Tensor]:
        """Read the parts of one or more tensors, and merge or split them."""
        parts = self._parts[first]
        tensors = read([name for name, _ in parts.sources])
        if parts.converter is None:
            return {first: tensors[parts.sources[0][0]]}
        converter = deepcopy(parts.converter)
        for name, pattern in parts.sources:
            converter.add_tensor(first, name, pattern, tensors.pop(name))
        made = converter.convert(first, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
