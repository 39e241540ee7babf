"""The record of hardware verification: which files passed, on which device, with which errors.

Only a program that has run on a GPU writes the record, so it is the only evidence that something ran.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.backends import Backend
from harness.errors import UserError
from harness.files import json_text
from harness.machine import versions

FORMAT_VERSION = 1
SUFFIXES = (".py", ".cu", ".cuh")


class RecordError(UserError):
    """Raised if a record cannot be read."""


def hashes(package: Path) -> dict[str, str]:
    """Compute the SHA-256 of every source file of a backend, by path in the package."""
    return {
        path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(package.rglob("*"))
        if path.suffix in SUFFIXES
    }


def add_to_record(file: Path, backend: Backend, part: str, results: dict[str, Any]) -> None:
    """Record that a backend passed all checks of a part on a device.

    Parameters
    ----------
    file : Path
        The record. Parts recorded for other file contents, devices or libraries are dropped.
    backend : Backend
        The backend that passed.
    part : {"golden", "real_model"}
        The checks that it passed.
    results : dict
        JSON report of `harness.verify`; for golden cases only the worst errors are kept.

    Raises
    ------
    UserError
        If the backend did not run on a device, or the file cannot be written.
    """
    try:
        identity = backend.package.identity()
    except (AttributeError, RuntimeError) as error:
        raise UserError(f"cannot record: backend {backend.name} did not run on a CUDA GPU: {error}") from None
    state = {
        "format_version": FORMAT_VERSION,
        **identity,
        "libraries": versions(),
        "files": hashes(Path(str(backend.package.__file__)).parent),
    }
    previous = _read(file) if file.exists() else {}
    same = all(previous.get(key) == value for key, value in state.items())
    if part == "golden":
        results = {precision: _worst_errors(operations) for precision, operations in results.items()}
    passed = {"date": datetime.now(UTC).date().isoformat(), **results}
    record = {**state, "passed": {**(previous["passed"] if same else {}), part: passed}}
    try:
        file.write_text(json_text(record) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None


def _worst_errors(operations: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        operation: {output: row["worst_error"] for output, row in result["outputs"].items()}
        for operation, result in operations.items()
        if result["outputs"]
    }


def changed_since(file: Path, package: Path) -> list[str]:
    """List the files of a backend that have changed since they were verified on hardware.

    Raises
    ------
    RecordError
        If the record exists but is malformed.
    """
    now = hashes(package)
    if not file.exists():
        return list(now)
    seen = _read(file)["files"]
    return sorted(name for name in now.keys() | seen.keys() if now.get(name) != seen.get(name))


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        version = record["format_version"]
        whole = isinstance(record["files"], dict) and isinstance(record["passed"], dict)
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{file} is not a verification record: {error!r}") from None
    if version != FORMAT_VERSION:
        raise RecordError(
            f"{file} has format version {version}, but this program reads only version {FORMAT_VERSION}"
        )
    if not whole:
        raise RecordError(f"{file} is not a verification record: `files` or `passed` is not an object")
    return record
