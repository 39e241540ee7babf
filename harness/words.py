"""Words of messages."""

from __future__ import annotations

IRREGULAR = {"matrix": "matrices"}


def counted(number: int, noun: str, form: str = "") -> str:
    """Return a number, in a format of Python, with its noun: "1 window", "2 windows"."""
    return f"{number:{form}} {noun if number == 1 else IRREGULAR.get(noun, noun + 's')}"
