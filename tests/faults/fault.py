"""A fault: one change of a source, whatever its language, and its name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

MODULE_LEVEL = "<module>"
# Characters of an expression shown on either side of what changes in it.
CONTEXT = 30

# File, function and change of a fault: what a reason for its survival is filed under, without a line number.
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Fault:
    """One change of one file.

    Attributes
    ----------
    file : str
        Path from the root of the project.
    line : int
        Where the change begins.
    lines : tuple of int
        First and last line of the outermost function it lies in, or its own.
    function : str
        Qualified name of the function or class it lies in, `MODULE_LEVEL` outside of any.
    kind : str
        What sort of change it is.
    change : str
        ``before → after``, the same for the same change wherever the function moves; a later one of
        the same text in the same function ends with its number.
    start, end : int
        The bytes of the file that are replaced.
    text : str
        What replaces them.
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
        """Whether it lies in a function with one of these lines, or outside of functions in one of them."""
        return not lines.isdisjoint(range(self.lines[0], self.lines[1] + 1))

    def planted(self, source: str) -> str:
        """The source with this fault."""
        data = source.encode()
        return (data[: self.start] + self.text.encode() + data[self.end :]).decode()


def named(faults: Iterable[Fault]) -> list[Fault]:
    """Faults in the order of their lines, each once; a later one of the same name gets a number."""
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
    """The two texts on one line each, without what they share far from the change."""
    before, after = (" ".join(text.split()) for text in (before, after))
    shorter = min(len(before), len(after))
    first = next((i for i in range(shorter) if before[i] != after[i]), shorter)
    same = next((i for i in range(shorter - first) if before[-1 - i] != after[-1 - i]), shorter - first)
    cut, rest = max(0, first - CONTEXT), max(0, same - CONTEXT)

    def part(text: str) -> str:
        return ("…" if cut else "") + text[cut : len(text) - rest] + ("…" if rest else "")

    return f"{part(before)} → {part(after)}"
