"""What came of the faults: the journal of a run, the reasons for survivors, and the committed outcome."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from tests.faults.fault import Fault

FORMAT_VERSION = 1
FOLDER = Path(__file__).parent
OUTCOME = FOLDER / "outcome.json"
REASONS = FOLDER / "survivors.toml"
JOURNAL = FOLDER / "journal.jsonl"

Key = tuple[str, str, str]


class OutcomeError(UserError):
    """A file of reasons or outcomes that is not what this program writes or reads."""


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


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

    A verdict holds as long as the faulty file is the same, and the test that failed with what its file has
    besides tests, or all test files where none failed.

    Parameters
    ----------
    file : Path
        Where it lies. A line that was cut off does not count; of two on one fault the later does.
    root : Path
        Folder of the project.
    """

    def __init__(self, file: Path, root: Path) -> None:
        self.file, self.root = file, root
        self.known: dict[Key, dict[str, Any]] = {}
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                self.known[tuple(entry["fault"])] = entry
        if len(lines) > len(self.known):
            kept = "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in self.known.values())
            _replace(file, kept)

    def find(
        self, fault: Fault, hashes: dict[str, str], briefly: bool = False
    ) -> tuple[Verdict | None, list[str] | None]:
        """What an earlier run says of a fault, for sources and tests of these hashes.

        Parameters
        ----------
        fault : Fault
            The fault.
        hashes : dict of str to str
            Of the files of its package, and of the tests.
        briefly : bool
            Whether it is enough that it has passed the tests that are likely to fail.

        Returns
        -------
        verdict : Verdict or None
            Its verdict, if it still holds.
        unseen : list of str or None
            Without a verdict: the test files that are left to judge the fault, which has survived the
            others as they are; None for all of them.
        """
        entry = self.known.get(fault.key)
        if entry is None or entry["sha256"] != hashes[fault.file] or (entry.get("briefly") and not briefly):
            return None, None
        if "test" in entry:
            return (Verdict(fault, entry["by"]) if entry["test"] == self._digest(entry["by"]) else None), None
        seen, tests = entry["tests"].items(), _tests(hashes)
        if entry["by"] is not None:
            return (Verdict(fault, entry["by"]) if seen <= tests.items() else None), None
        unseen = [name for name, sha256 in tests.items() if (name, sha256) not in seen]
        if not unseen:
            return Verdict(fault, None), None
        # What tests share may have changed any of them.
        return None, unseen if all(Path(name).name.startswith("test_") for name in unseen) else None

    def add(self, verdict: Verdict, hashes: dict[str, str], seconds: float, briefly: bool = False) -> None:
        """Write a verdict on sources and tests of these hashes, by the likely tests alone or by all."""
        entry: dict[str, Any] = {
            "fault": verdict.fault.key,
            "sha256": hashes[verdict.fault.file],
            "by": verdict.by,
            "seconds": seconds,
        }
        test = self._digest(verdict.by)
        entry |= {"tests": _tests(hashes)} if test is None else {"test": test}
        if briefly and verdict.by is None:
            entry["briefly"] = True
        with self.file.open("a", encoding="utf-8") as out:
            print(json.dumps(entry, ensure_ascii=False), file=out)

    def _digest(self, by: str | None) -> str | None:
        """Hash of a test and of what its file has besides tests; None where `by` names no test."""
        name, _, test = (by or "").partition("::")
        if not (self.root / name).is_file():
            return None
        tree = ast.parse((self.root / name).read_text(encoding="utf-8"))
        function = test.partition("[")[0]
        tree.body = [
            node
            for node in tree.body
            if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))
            or node.name == function
        ]
        return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def _tests(hashes: dict[str, str]) -> dict[str, str]:
    return {name: sha256[:16] for name, sha256 in hashes.items() if name.startswith("tests/")}


def _replace(file: Path, text: str) -> None:
    # A run may be killed at any moment: the file is the old one or the new.
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


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


def write_outcome(
    file: Path, source: str, sha256: str, verdicts: list[Verdict], reasons: dict[Key, str], sources: list[str]
) -> None:
    """Record what came of all faults of one source; what is known of the other `sources` stays."""
    files = {name: entry for name, entry in load_outcome(file).items() if name in sources}
    files[source] = {
        "sha256": sha256,
        "faults": dict(sorted(Counter(verdict.fault.kind for verdict in verdicts).items())),
        "caught": sum(verdict.by is not None for verdict in verdicts),
        "hung": sum(verdict.by == "hang" for verdict in verdicts),
        "survivors": [
            {
                "line": verdict.fault.line,
                "function": verdict.fault.function,
                "kind": verdict.fault.kind,
                "fault": verdict.fault.change,
                "reason": reasons.get(verdict.fault.key, ""),
            }
            for verdict in verdicts
            if verdict.by is None
        ],
    }
    record = {"format_version": FORMAT_VERSION, "files": dict(sorted(files.items()))}
    _replace(file, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


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
