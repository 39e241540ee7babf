"""Read and write golden cases on disk, and check them against their SHA-256.

`manifest.json` lists the cases, grouped by operation (``module.function`` of `reference`), by the origin of
the answers, and by the names of input and output arrays; each case lists its other arguments. The safetensors
files beside the manifest hold the tensors, as ``operation:label.inputs.W``; a case that shares a tensor with
another names it. The committed files are the truth; `golden.generate` only shows that they can be reproduced.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

FORMAT_VERSION = 2
FOLDER = Path(__file__).parent
MANIFEST = "manifest.json"
KINDS = ("exact", "degenerate", "real")
GROUPS = ("inputs", "outputs", "margins")
# Maximum width of a line in the manifest.
WIDTH = 110

Array = NDArray[Any]
Tensors = dict[str, Array]


class GoldenError(Exception):
    """Golden files are missing or changed; the message names the file."""


@dataclass(frozen=True)
class Case:
    """One call with a known answer.

    Attributes
    ----------
    name : str
        Unique.
    operation : str
        ``module.function``, as in ``atq.flexible_round``.
    kind : {"exact", "degenerate", "real"}
        Rational arithmetic on small numbers, rational arithmetic on edge cases, or slices of a real model.
    origin : str
        Where the answer comes from.
    inputs : dict of str to ndarray
        Array arguments; ``start.alpha`` is a member of the tuple ``start``.
    parameters : dict
        All other arguments; for ``ternarize``, the fields of its configuration.
    outputs : dict of str to ndarray
        The expected outputs, in the order in which the function returns them.
    margins : dict of str to ndarray
        For trits of measured cases: the distance of each decision from its threshold, in units of |Z| for
        rounding (Eq. 10), or relative to the threshold for Eq. 2. If decisions depend on each other, only
        the minimum per row or overall, including gaps between similarities and distances from float16
        rounding thresholds.
    raises : str, optional
        The exception expected instead of outputs.
    """

    name: str
    operation: str
    kind: str
    origin: str
    inputs: Tensors
    parameters: dict[str, Any] = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)
    margins: Tensors = field(default_factory=dict)
    raises: str | None = None


def load_cases(folder: Path = FOLDER) -> list[Case]:
    """Load every case of a folder, after checking all its files.

    Raises
    ------
    GoldenError
        If a file is missing, changed or not listed, or the manifest has changed.
    """
    manifest, files = read_folder(folder)
    return [_case(entry, files[entry["file"]], folder) for entry in manifest["cases"]]


def _case(entry: dict[str, Any], tensors: Tensors, folder: Path) -> Case:
    def group(name: str) -> Tensors:
        return {argument: tensors[key] for argument, key in entry.get(name, {}).items()}

    try:
        return Case(
            name=entry["name"],
            operation=entry["operation"],
            kind=entry["kind"],
            origin=entry["origin"],
            inputs=group("inputs"),
            parameters=entry.get("parameters", {}),
            outputs=group("outputs"),
            margins=group("margins"),
            raises=entry.get("raises"),
        )
    except KeyError as missing:
        raise GoldenError(
            f"{folder / MANIFEST}: case {entry.get('name')} needs {missing}, "
            f"which neither it nor {entry['file']} holds"
        ) from None


def read_folder(folder: Path = FOLDER) -> tuple[dict[str, Any], dict[str, Tensors]]:
    """Read the manifest and the tensors of every file it lists, and check them all.

    Raises
    ------
    GoldenError
        As for `load_cases`.
    """
    manifest = read_manifest(folder)
    listed = manifest["files"]
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in listed:
            raise GoldenError(f"{path} is not listed in {MANIFEST}")
    files = {}
    for name, record in listed.items():
        path = folder / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise GoldenError(f"{path} cannot be read: {error.strerror}") from None
        digest = hashlib.sha256(data).hexdigest()
        if digest != record["sha256"]:
            raise GoldenError(
                f"{path} has changed: its SHA-256 is {digest[:16]}..., {MANIFEST} says "
                f"{record['sha256'][:16]}.... Restore the committed file."
            )
        try:
            files[name] = load(data)
        except SafetensorError as error:
            raise GoldenError(f"{path} is not a safetensors file: {error}") from None
    return manifest, files


def read_manifest(folder: Path = FOLDER) -> dict[str, Any]:
    """Read the manifest; refuse it if any byte has changed since `write_folder`.

    Raises
    ------
    GoldenError
        If the manifest is missing, has changed, or has another format version.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GoldenError(f"{path} cannot be read: {error}") from None
    try:
        stored = json.loads(text)
        version = stored["format_version"]
        if version != FORMAT_VERSION:
            raise GoldenError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}")
        manifest = {**stored, "cases": _entries(stored["cases"])}
        intact = _render(manifest) == text
    except (ValueError, KeyError, TypeError, AttributeError):
        raise GoldenError(f"{path} is not a manifest of golden cases") from None
    if not intact:
        raise GoldenError(f"{path} has changed: its checksum does not fit. Restore the committed file.")
    return manifest


def pack(file: str, cases: Iterable[Case], tensors: Tensors | None = None) -> tuple[Tensors, list[dict]]:
    """Return the tensors of one file, and the manifest's entries for its cases.

    `tensors` are stored first, under their own names. Equal tensors are stored once: cases on the same matrix
    share it.
    """
    stored: Tensors = {}
    known: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def store(key: str, array: Array) -> str:
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        identity = (array.dtype.str, array.shape, array.tobytes())
        if identity not in known:
            if key in stored:
                raise ValueError(f"two cases are called {key.split('.inputs')[0]}")
            known[identity] = key
            stored[key] = array
        return known[identity]

    for key, array in (tensors or {}).items():
        store(key, array)
    entries = []
    for case in cases:
        entry: dict[str, Any] = {"name": case.name, "operation": case.operation, "kind": case.kind}
        entry["file"] = file
        for group in GROUPS:
            members: Tensors = getattr(case, group)
            if members:
                entry[group] = {name: store(f"{case.name}.{group}.{name}", a) for name, a in members.items()}
        if case.parameters:
            entry["parameters"] = case.parameters
        if case.raises:
            entry["raises"] = case.raises
        entry["origin"] = case.origin
        entries.append(entry)
    return stored, entries


def write_folder(folder: Path, files: dict[str, Tensors], entries: list[dict]) -> None:
    """Write tensors and manifest; keep all other files of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    records = {}
    for name in sorted(files):
        data = save(files[name])
        (folder / name).write_bytes(data)
        records[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    entries = sorted(entries, key=lambda entry: (KINDS.index(entry["kind"]), entry["file"]))
    manifest = {"format_version": FORMAT_VERSION, "files": records, "cases": entries}
    (folder / MANIFEST).write_text(_render(manifest), encoding="utf-8")


def _render(manifest: dict[str, Any]) -> str:
    """Format the manifest as text; its last entry is the SHA-256 of everything before."""
    content = {key: manifest[key] for key in ("format_version", "files")}
    content["cases"] = _grouped(manifest["cases"])
    digest = hashlib.sha256(_lines(content).encode()).hexdigest()
    return _lines({**content, "sha256": digest}) + "\n"


def _grouped(entries: list[dict]) -> list[dict]:
    """Group entries by operation, origin and array names, and drop what their labels imply."""
    groups: dict[str, dict[str, Any]] = {}
    for entry in entries:
        common = {
            "operation": entry["operation"],
            "origin": entry["origin"],
            **{part: list(entry[part]) for part in GROUPS if part in entry},
            **({"raises": entry["raises"]} if "raises" in entry else {}),
        }
        case: dict[str, Any] = {}
        if "parameters" in entry:
            case["parameters"] = entry["parameters"]
        for part in GROUPS:
            for member, key in entry.get(part, {}).items():
                if key != f"{entry['name']}.{part}.{member}":
                    case.setdefault("shared", {})[f"{part}.{member}"] = key
        files = groups.setdefault(json.dumps(common), {**common, "cases": {}})["cases"]
        label = entry["name"].removeprefix(f"{entry['operation']}:")
        files.setdefault(entry["file"], {})[label] = case
    return list(groups.values())


def _entries(groups: list[dict]) -> list[dict]:
    """Invert `_grouped`; the kind of a case is the kind of its file."""
    entries = []
    for group in groups:
        common = {key: group[key] for key in ("operation", "origin", "raises") if key in group}
        for file, cases in group["cases"].items():
            for label, case in cases.items():
                name, shared = f"{group['operation']}:{label}", case.get("shared", {})
                entry = {**common, "name": name, "file": file, "kind": file.split(".")[0].split("-")[0]}
                for part in GROUPS:
                    if part in group:
                        keys = {member: f"{part}.{member}" for member in group[part]}
                        entry[part] = {m: shared.get(key, f"{name}.{key}") for m, key in keys.items()}
                if "parameters" in case:
                    entry["parameters"] = case["parameters"]
                entries.append(entry)
    return entries


def _lines(value: Any, depth: int = 0, before: int = 0) -> str:
    """Format JSON with as much per line as fits, after `before` characters."""
    text = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or not value or depth + before + len(text) < WIDTH:
        return text
    if isinstance(value, dict):
        (opening, closing), names = "{}", [f"{json.dumps(key, ensure_ascii=False)}: " for key in value]
        items = zip(names, value.values(), strict=True)
    else:
        (opening, closing), items = "[]", zip([""] * len(value), value, strict=True)
    inside = [f"{' ' * (depth + 1)}{name}{_lines(item, depth + 1, len(name))}" for name, item in items]
    return "\n".join([opening, ",\n".join(inside), " " * depth + closing])
