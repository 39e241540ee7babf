"""The record of what has been verified on hardware: which files, on which device, with which errors.

Only a program that ran on a device writes it, so it is the one place that says that something did.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.backends import Backend
from harness.cli import UserError, json_text

FORMAT_VERSION = 1
LIBRARIES = ("numpy", "scipy", "cupy-cuda12x", "cupy-cuda13x", "numba", "numba-cuda")
SUFFIXES = (".py", ".cu", ".cuh")


class RecordError(UserError):
    """A record that cannot be read."""


def hashes(package: Path) -> dict[str, str]:
    """SHA-256 of every source file of a backend, by its path in the package."""
    return {
        path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(package.rglob("*"))
        if path.suffix in SUFFIXES
    }


def write_record(file: Path, backend: Backend, operations: dict[str, Any]) -> None:
    """Write what a full pass of the golden cases on a device has shown.

    Raises
    ------
    UserError
        If the backend did not run on a device, or the file cannot be written.
    """
    try:
        identity = backend.package.identity()
    except (AttributeError, RuntimeError) as error:
        raise UserError(
            f"nothing to record: backend {backend.name} did not run on a device: {error}"
        ) from None
    installed = {
        distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()
    }
    record = {
        "format_version": FORMAT_VERSION,
        "date": datetime.now(UTC).date().isoformat(),
        **identity,
        "libraries": {name: installed[name] for name in LIBRARIES if name in installed},
        "worst_errors": {
            operation: {output: row["worst_error"] for output, row in results["outputs"].items()}
            for operation, results in operations.items()
            if results["outputs"]
        },
        "files": hashes(Path(str(backend.package.__file__)).parent),
    }
    try:
        file.write_text(json_text(record) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None


def changed_since(file: Path, package: Path) -> list[str]:
    """Files of a backend that no pass on hardware has seen as they are now.

    Raises
    ------
    RecordError
        If there is a record and it is malformed.
    """
    now = hashes(package)
    if not file.exists():
        return list(now)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        version, seen = record["format_version"], dict(record["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{file} is not a record of verification: {error!r}") from None
    if version != FORMAT_VERSION:
        raise RecordError(f"{file} has format version {version}, this program reads {FORMAT_VERSION}")
    return sorted(name for name in now.keys() | seen.keys() if now.get(name) != seen.get(name))
