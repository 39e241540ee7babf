"""Read JSON files with errors that name the file; write them atomically."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from harness.errors import UserError


def json_text(value: Any) -> str:
    """Serialize to standard JSON; non-finite numbers become the strings "nan", "inf" and "-inf".

    Lone surrogates, as in file names that are not Unicode, are escaped; the rest is as it is.
    """

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {str(key): plain(entry) for key, entry in item.items()}
        if isinstance(item, list | tuple):
            return [plain(entry) for entry in item]
        if isinstance(item, Path):
            return str(item)
        return str(item) if isinstance(item, float) and not math.isfinite(item) else item

    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace").decode()  # JSON has the same escapes


def read_json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises
    ------
    UserError
        If the file cannot be read, is not JSON, or holds no object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} is missing or damaged: {error}") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged: not a JSON object")
    return value


def write_json(file: Path, value: Any) -> None:
    """Write JSON atomically: the file is either the old one or the complete new one."""
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(json_text(value) + "\n", encoding="utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
