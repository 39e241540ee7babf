"""Verdicts on faults, and the reasons for survivors."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tests.faults.fault import Fault, Key

REASONS = Path(__file__).with_name("survivors.toml")
VERDICTS = Path(__file__).with_name("outcome.jsonl")


class ReasonsError(Exception):
    """The file of reasons is malformed."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on one fault.

    Attributes
    ----------
    fault : Fault
        The planted fault.
    by : str
        The test that failed, the way the tests ended ("crash" or "hang"), `judge.PASSED` or
        `judge.UNCOMPILED`.
    seconds : float
        Duration of the tests.
    """

    fault: Fault
    by: str
    seconds: float


def load_reasons(file: Path = REASONS) -> dict[Key, str]:
    """Load the reasons why faults survive, by key of the fault.

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
        raise ReasonsError(f"{file} is not a valid file of reasons: {error!r}") from None
    return reasons


def as_reasons(faults: list[Fault]) -> str:
    """Format survivors for the file of reasons, with empty reasons."""
    groups: dict[tuple[str, str], list[str]] = {}
    for fault in faults:
        groups.setdefault(fault.key[:2], []).append(json.dumps(fault.change, ensure_ascii=False))
    return "\n".join(
        f'[[survivors]]\nfile = "{file}"\nfunction = "{function}"\nreason = ""\nfaults = [\n'
        + "".join(f"    {change},\n" for change in changes)
        + "]\n"
        for (file, function), changes in groups.items()
    )
