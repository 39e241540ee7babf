"""A fault: one change of a source file in any language, and its name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

MODULE_LEVEL = "<module>"
# Characters shown on either side of a change in an expression.
CONTEXT = 30

# File, function and change of a fault: the key of its reason in survivors.toml, without a line number.
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Fault:
    """One change of one file.

    Attributes
    ----------
    file : str
        Path from the root of the project.
    line : int
        First line of the change.
    lines : tuple of int
        First and last line of the outermost enclosing function, or of the change itself.
    function : str
        Qualified name of the enclosing function or class, `MODULE_LEVEL` if there is none.
    kind : str
        Kind of the change.
    change : str
        ``before → after``, independent of the position of the function in the file; repeated changes with
        the same text in the same function are numbered.
    start, end : int
        Range of bytes of the file to replace.
    text : str
        The replacement.
    """

    file: str
    line: int
    lines: tuple[int, int]
    function: str
    kind: str
    change: str
    start: int
    end: int
    text: str

    @property
    def key(self) -> Key:
        """Its name."""
        return self.file, self.function, self.change

    def concerns(self, lines: set[int]) -> bool:
        """Whether its outermost function contains one of these lines; outside functions, its own lines."""
        return not lines.isdisjoint(range(self.lines[0], self.lines[1] + 1))

    def planted(self, source: str) -> str:
        """Return the source with this fault."""
        data = source.encode()
        return (data[: self.start] + self.text.encode() + data[self.end :]).decode()


def named(faults: Iterable[Fault]) -> list[Fault]:
    """Sort faults by line and drop duplicates; number later ones of the same name."""
    seen: set[tuple[int, int, str]] = set()
    numbers: dict[Key, int] = {}
    found = []
    for fault in sorted(faults, key=lambda fault: (fault.start, fault.end)):
        place = fault.start, fault.end, fault.text
        if place in seen:
            continue
        seen.add(place)
        number = numbers[fault.key] = numbers.get(fault.key, 0) + 1
        if number > 1:
            fault = replace(fault, change=f"{fault.change} #{number}")
        found.append(fault)
    return found


def shown(before: str, after: str) -> str:
    """Format both texts on one line each, without the common parts far from the change."""
    before, after = (" ".join(text.split()) for text in (before, after))
    shorter = min(len(before), len(after))
    first = next((i for i in range(shorter) if before[i] != after[i]), shorter)
    same = next((i for i in range(shorter - first) if before[-1 - i] != after[-1 - i]), shorter - first)
    cut, rest = max(0, first - CONTEXT), max(0, same - CONTEXT)

    def part(text: str) -> str:
        return ("…" if cut else "") + text[cut : len(text) - rest] + ("…" if rest else "")

    return f"{part(before)} → {part(after)}"
