"""JSON files: read with errors that name the file, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from harness.errors import UserError


def json_text(value: Any) -> str:
    """JSON that every parser reads: what is not finite becomes the text "nan", "inf" or "-inf"."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {str(key): plain(entry) for key, entry in item.items()}
        if isinstance(item, list | tuple):
            return [plain(entry) for entry in item]
        if isinstance(item, Path):
            return str(item)
        return str(item) if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} is missing or damaged: {error}") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged, it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged: it holds no JSON object")
    return value


def write_json(file: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, never half."""
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(json_text(value) + "\n", encoding="utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
