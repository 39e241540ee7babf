"""What came of the faults: the journal of a run, the reasons for survivors, and the committed outcome."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.plant import Fault

FORMAT_VERSION = 1
FOLDER = Path(__file__).parent
OUTCOME = FOLDER / "outcome.json"
REASONS = FOLDER / "survivors.toml"
JOURNAL = FOLDER / "journal.jsonl"

Key = tuple[str, str, str]


class OutcomeError(Exception):
    """A file of reasons or outcomes that is not what this program writes or reads."""


def digest(*files: Path) -> str:
    """SHA-256 of the contents of files."""
    total = hashlib.sha256()
    for file in files:
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest() if len(files) != 1 else hashlib.sha256(files[0].read_bytes()).hexdigest()


@dataclass(frozen=True)
class Verdict:
    """What came of one fault.

    Attributes
    ----------
    fault : Fault
        What was planted.
    by : str or None
        The test that failed, or how the tests ended; None if all of them passed.
    """

    fault: Fault
    by: str | None


class Journal:
    """Every verdict as it came, one a line, so that a run that was killed can be taken up again.

    A verdict holds as long as the faulty file is the same, and the file of the test that failed, or all
    test files where none did.
    """

    def __init__(self, file: Path, root: Path) -> None:
        self.file = file
        self.root = root
        self.known: dict[Key, dict[str, Any]] = {}

    def load(self) -> None:
        """Take up what an earlier run has written; a line that was cut off does not count."""
        if not self.file.exists():
            return
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            self.known[tuple(entry["fault"])] = entry

    def find(self, fault: Fault, tests: list[Path]) -> Verdict | None:
        """The verdict of an earlier run, if it still holds."""
        entry = self.known.get(fault.key)
        if entry is None or entry["sha256"] != digest(self.root / fault.file):
            return None
        holds = entry["tests"] == self._judges(entry["by"], tests)
        return Verdict(fault, entry["by"]) if holds else None

    def add(self, verdict: Verdict, tests: list[Path], seconds: float) -> None:
        """Write a verdict."""
        entry = {
            "fault": verdict.fault.key,
            "sha256": digest(self.root / verdict.fault.file),
            "by": verdict.by,
            "tests": self._judges(verdict.by, tests),
            "seconds": seconds,
        }
        with self.file.open("a", encoding="utf-8") as out:
            print(json.dumps(entry, ensure_ascii=False), file=out)

    def _judges(self, by: str | None, tests: list[Path]) -> str:
        named = self.root / (by or "").partition("::")[0]
        return digest(named) if named.is_file() else digest(*tests)


def load_reasons(file: Path = REASONS) -> dict[Key, str]:
    """Why faults survive, by what the faults are.

    Raises
    ------
    OutcomeError
        If the file is malformed, a reason is missing, or a fault has two.
    """
    reasons: dict[Key, str] = {}
    try:
        groups = tomllib.loads(file.read_text(encoding="utf-8")).get("survivors", [])
        for group in groups:
            for change in group["faults"]:
                key = group["file"], group["function"], change
                if not group["reason"].strip() or key in reasons:
                    raise OutcomeError(f"{file}: {' '.join(key)} has no reason, or two")
                reasons[key] = " ".join(group["reason"].split())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutcomeError(f"{file} does not hold reasons: {error!r}") from None
    return reasons


def as_reasons(verdicts: list[Verdict]) -> str:
    """Survivors as they are entered into the file of reasons, the reasons to be filled in."""
    groups: dict[tuple[str, str], list[str]] = {}
    for verdict in verdicts:
        groups.setdefault(verdict.fault.key[:2], []).append(verdict.fault.change)
    lines = []
    for (file, function), changes in groups.items():
        lines += [
            "[[survivors]]",
            f'file = "{file}"',
            f'function = "{function}"',
            'reason = ""',
            "faults = [",
        ]
        lines += [f"    {json.dumps(change, ensure_ascii=False)}," for change in changes]
        lines += ["]", ""]
    return "\n".join(lines)


def load_outcome(file: Path = OUTCOME) -> dict[str, dict[str, Any]]:
    """What is recorded of every file.

    Raises
    ------
    OutcomeError
        If it is malformed.
    """
    if not file.exists():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        version, files = record["format_version"], record["files"]
        if version != FORMAT_VERSION:
            raise OutcomeError(f"{file} has format version {version}, this program reads {FORMAT_VERSION}")
        for name, entry in files.items():
            survivors = [
                (s["line"], s["function"], s["kind"], s["fault"], s["reason"]) for s in entry["survivors"]
            ]
            if not isinstance(entry["sha256"], str) or (
                entry["caught"] + len(survivors) != sum(entry["faults"].values())
            ):
                raise OutcomeError(f"{file}: the faults of {name} do not add up")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutcomeError(f"{file} is not an outcome: {error!r}") from None
    return files


def write_outcome(file: Path, root: Path, verdicts: list[Verdict], reasons: dict[Key, str]) -> None:
    """Record files of which every fault was judged; what is known of others stays."""
    files = {name: entry for name, entry in load_outcome(file).items() if (root / name).exists()}
    for name in {verdict.fault.file for verdict in verdicts}:
        own = [verdict for verdict in verdicts if verdict.fault.file == name]
        files[name] = {
            "sha256": digest(root / name),
            "faults": dict(sorted(Counter(verdict.fault.kind for verdict in own).items())),
            "caught": sum(verdict.by is not None for verdict in own),
            "hung": sum(verdict.by == "hang" for verdict in own),
            "survivors": [
                {
                    "line": verdict.fault.line,
                    "function": verdict.fault.function,
                    "kind": verdict.fault.kind,
                    "fault": verdict.fault.change,
                    "reason": reasons.get(verdict.fault.key, ""),
                }
                for verdict in own
                if verdict.by is None
            ],
        }
    record = {"format_version": FORMAT_VERSION, "files": dict(sorted(files.items()))}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    # A run may be killed at any moment; the record is the old one or the new.
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def changed_since(file: Path, root: Path, sources: list[str]) -> list[str]:
    """Source files in which no faults have been planted as they are now.

    Raises
    ------
    OutcomeError
        If the record is malformed.
    """
    files = load_outcome(file)
    now = {name: digest(root / name) for name in sources}
    return sorted(name for name in now.keys() | files if now.get(name) != files.get(name, {}).get("sha256"))
