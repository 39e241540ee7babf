"""What came of the faults: the verdicts of a run, and the reasons for survivors."""

from __future__ import annotations

import contextlib
import json
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults.fault import Fault, Key

FOLDER = Path(__file__).parent
REASONS = FOLDER / "survivors.toml"
VERDICTS = FOLDER / "outcome.jsonl"


class ReasonsError(Exception):
    """A file of reasons that is malformed."""


@dataclass(frozen=True)
class Verdict:
    """What came of one fault.

    Attributes
    ----------
    fault : Fault
        What was planted.
    by : str
        The test that failed, how the tests ended, `judge.PASSED` or `judge.UNCOMPILED`.
    seconds : float
        What the tests took.
    """

    fault: Fault
    by: str
    seconds: float


class Journal:
    """Every verdict as it came, one a line, so that a run that was killed can be resumed.

    Parameters
    ----------
    file : Path
        Where it lies. A line that was cut off does not count; of two on one fault the later does.
    state : str
        Digest of the sources, tests and reasons; verdicts on others do not hold.
    """

    def __init__(self, file: Path, state: str) -> None:
        self.file, self.state = file, state

    def known(self) -> dict[Key, tuple[str, float]]:
        """Verdicts of earlier runs that hold, with their seconds."""
        known = {}
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else ():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if entry["state"] == self.state:
                    fault = entry["fault"]
                    known[fault["file"], fault["function"], fault["change"]] = entry["by"], entry["seconds"]
        return known

    def add(self, verdict: Verdict) -> None:
        """Append a verdict."""
        with self.file.open("a", encoding="utf-8") as out:
            print(json.dumps({"state": self.state, **asdict(verdict)}, ensure_ascii=False), file=out)


def load_reasons(file: Path = REASONS) -> dict[Key, str]:
    """Why faults survive, by what the faults are.

    Raises
    ------
    ReasonsError
        If the file is malformed, a reason is missing, or a fault has two.
    """
    reasons: dict[Key, str] = {}
    try:
        for group in tomllib.loads(file.read_text(encoding="utf-8")).get("survivors", []):
            for change in group["faults"]:
                key = group["file"], group["function"], change
                if not group["reason"].strip() or key in reasons:
                    raise ReasonsError(f"{file}: {' '.join(key)} has no reason, or two")
                reasons[key] = " ".join(group["reason"].split())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReasonsError(f"{file} does not hold reasons: {error!r}") from None
    return reasons


def as_reasons(faults: list[Fault]) -> str:
    """Survivors as they are entered into the file of reasons, the reasons to be filled in."""
    groups: dict[tuple[str, str], list[str]] = {}
    for fault in faults:
        groups.setdefault(fault.key[:2], []).append(json.dumps(fault.change, ensure_ascii=False))
    return "\n".join(
        f'[[survivors]]\nfile = "{file}"\nfunction = "{function}"\nreason = ""\nfaults = [\n'
        + "".join(f"    {change},\n" for change in changes)
        + "]\n"
        for (file, function), changes in groups.items()
    )
