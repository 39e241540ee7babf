"""Read the settings and tensors of a GGUF file, which may come in several parts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.errors import UserError
from harness.models.folder import require_no_pointer
from harness.models.original import summary

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

# Values that are dequantized at a time; a float32 copy of a whole embedding would take gigabytes.
CHUNK = 1 << 24


class GgufFile:
    """The settings and tensors of a GGUF file, with all its parts.

    Parameters
    ----------
    path : Path
        The file, or any part of one in several parts.

    Attributes
    ----------
    parts : list of Path
        The files, in order; settings and tokenizer are in the first.
    architecture : str
        Name of the architecture, which its keys begin with.
    tensors : dict
        The reader's tensors by their names.

    Raises
    ------
    UserError
        If a file does not exist, is not a GGUF file, is incomplete, or is not a whole model.
    """

    def __init__(self, path: Path) -> None:
        reader = _open(path)
        self.parts = _parts(path, int(_contents(reader.fields, "split.count", 1)))
        readers = [reader if part == path else _open(part) for part in self.parts]
        if len(readers) > 1:
            _require_one_split(self.parts, readers)
        self.fields = readers[0].fields
        self.tensors = {tensor.name: tensor for one in readers for tensor in one.tensors}
        kind = _contents(self.fields, "general.type", "model")
        self.architecture = _contents(self.fields, "general.architecture", None)
        if kind != "model" or self.architecture in (None, "clip"):
            raise UserError(
                f"{path} holds no language model: its general.type is {kind}, its general.architecture "
                f"{self.architecture}"
            )

    @property
    def path(self) -> Path:
        """The first part."""
        return self.parts[0]

    def own_keys(self) -> list[str]:
        """Names of the settings of the architecture, without its own name before them."""
        prefix = f"{self.architecture}."
        return [key.removeprefix(prefix) for key in self.fields if key.startswith(prefix)]

    def value(self, key: str, default: Any = None) -> Any:
        """Value of a key by its full name; a float32 as the shortest decimal that rounds to it."""
        return _contents(self.fields, key, default)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in torch's order."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def tensor(
        self, name: str, dtype: torch.dtype, change: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Dequantize a tensor in float32, change its values, and round them once.

        Parameters
        ----------
        name : str
            Name in the file.
        dtype : torch.dtype
            dtype of the result.
        change : callable, optional
            Elementwise change of the float32 values.

        Raises
        ------
        UserError
            If gguf cannot dequantize the tensor's type.
        """
        import gguf

        tensor = self.tensors[name]
        shape = self.shape(name)
        result = torch.empty(shape, dtype=dtype)
        rows = result.reshape(-1, shape[-1])
        data = tensor.data.reshape(len(rows), -1)
        step = max(1, CHUNK // shape[-1])
        for start in range(0, len(rows), step):
            try:
                values = gguf.dequantize(data[start : start + step], tensor.tensor_type)
            except NotImplementedError:
                raise UserError(
                    f"{self.path}: the tensor {name} has the type {tensor.tensor_type.name}, which the "
                    "installed gguf cannot dequantize; pass a file of another type"
                ) from None
            # The data are read-only, which torch warns of.
            exact = torch.from_numpy(np.array(values, dtype=np.float32))
            rows[start : start + step] = change(exact) if change else exact
        return result


def _open(path: Path) -> Any:
    import gguf

    if not path.is_file():
        raise UserError(f"{path} does not exist")
    require_no_pointer(path)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # of a damaged file: IndexError, ValueError, UnicodeDecodeError and others
        raise UserError(f"{path} could not be read; is the file complete? {summary(error)}") from None
    if reader.byte_order == "S":  # gguf would dequantize its blocks in the wrong order
        raise UserError(f"{path} has its bytes in the order of another kind of machine; get it in this one's")
    return reader


def _contents(fields: dict[str, Any], key: str, default: Any) -> Any:
    from gguf import GGUFValueType

    field = fields.get(key)
    if field is None:
        return default
    value = field.contents()
    if field.types[-1] != GGUFValueType.FLOAT32:
        return value
    if isinstance(value, list):
        return [float(str(np.float32(one))) for one in value]
    return float(str(np.float32(value)))


def _parts(path: Path, count: int) -> list[Path]:
    """Paths of all parts; refuse a part whose name does not tell those of the others."""
    if count <= 1:
        return [path]
    name = PART.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise UserError(
            f"{path} is one of {count} parts; name them NAME-00001-of-{count:05d}.gguf and so on, as they "
            "were written"
        )
    parts = [path.with_name(f"{name[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    lacking = [part.name for part in parts if not part.is_file()]
    if lacking:
        raise UserError(f"{path} is one of {count} parts, and {', '.join(lacking)} is not beside it")
    return parts


def _require_one_split(parts: list[Path], readers: list[Any]) -> None:
    """Refuse parts in the wrong places, and parts of different files."""
    total = sum(len(reader.tensors) for reader in readers)
    for number, (part, reader) in enumerate(zip(parts, readers, strict=True)):
        own, count = _contents(reader.fields, "split.no", None), _contents(reader.fields, "split.count", None)
        if (own, count) != (number, len(parts)):
            raise UserError(
                f"{part} is not part {number + 1} of {len(parts)}, as its name says; get it again"
            )
        expected = _contents(reader.fields, "split.tensors.count", total)
        if expected != total:
            raise UserError(
                f"{part} belongs to a file of {expected} tensors, but its {len(parts)} parts have {total}; "
                "are they of one model?"
            )
