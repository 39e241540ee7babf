"""The settings of a GGUF file's architecture, and which of them have been read."""

from __future__ import annotations

from typing import Any

from harness.errors import UserError
from harness.models.gguf_file import GgufFile


class Keys:
    """The keys of a file's architecture; it knows which have been read."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a key, or `default` if the file lacks it."""
        self._read.add(key)
        return self.file.value(f"{self.file.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        """Value of a key that every file has."""
        value = self.get(key)
        if value is None:
            raise UserError(f"{self.file.path} lacks the key {self.file.architecture}.{key}")
        return value

    def alike(self, key: str, default: Any = None) -> Any:
        """Value of a key that may be a list with one value for each layer, all the same."""
        value = self.need(key) if default is None else self.get(key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                self.refuse(key, value)
            return value[0]
        return value

    def refuse(self, key: str, value: Any) -> None:
        """Refuse the value of a key by name."""
        raise UserError(
            f"{self.file.path} has the setting {self.file.architecture}.{key} = {str(value)[:60]}, which no "
            "model read from it would have; pass the original model's folder instead"
        )

    def unread(self) -> list[str]:
        """Keys that nothing has read."""
        return [key for key in self.file.own_keys() if key not in self._read]

    def has(self, *endings: str) -> bool:
        """Whether the file has a tensor whose name ends so."""
        return any(name.endswith(endings) for name in self.file.tensors)
