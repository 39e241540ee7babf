"""An answer ends before its first stop text, however the text arrives in pieces."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from harness.generate.stops import UntilStop, cut

STOPS = [("ab",), ("aab", "b"), ("abab",), ("c",), ("ba", "aa"), ()]
# Every text of six letters, and every way to cut one into pieces.
TEXTS = ["".join(letters) for letters in itertools.product("ab", repeat=6)]
CUTS = [[place for place in range(1, 6) if places >> place & 1] for places in range(0, 64, 2)]


def before(text: str, stops: tuple[str, ...]) -> str:
    """The longest beginning of a text in which, with what follows it, no stop text begins."""
    starts = [place for place in range(len(text)) if any(text[place:].startswith(stop) for stop in stops)]
    return text[: starts[0]] if starts else text


def pieces(text: str, cuts: list[int]) -> list[str]:
    return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]


@pytest.mark.parametrize("stops", STOPS, ids=" ".join)
def test_pieces_join_to_the_text_before_the_stop(stops: tuple[str, ...]) -> None:
    for text, cuts in itertools.product(TEXTS, CUTS):
        until_stop = UntilStop(stops)
        passed = [until_stop.take(piece) for piece in pieces(text, cuts)]
        assert before(text, stops).startswith("".join(passed))
        assert "".join(passed) + until_stop.take("", last=True) == before(text, stops) == cut(text, stops)


def test_nothing_is_held_back_that_cannot_begin_a_stop() -> None:
    until_stop = UntilStop(("abc", "xy"))
    assert [until_stop.take(piece) for piece in "zabxab"] == ["z", "", "", "ab", "x", ""]


def test_a_queue_passes_on_what_is_no_text() -> None:
    app = pytest.importorskip("harness.serve.app", reason="needs the extra serve")

    class Other(str):
        """What transformers makes of reasoning."""

    async def read(stops: tuple[str, ...]) -> list[Any]:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        for part in (Other("ab"), "xa", error, "bc", None):
            queue.put_nowait(part)
        stopped, found = app.QueueUntilStop(queue, stops), []
        while not found or found[-1] is not None:
            found.append(await stopped.get() if len(found) % 2 else stopped.get_nowait())
        with pytest.raises(asyncio.QueueEmpty):
            stopped.get_nowait()
        return found

    error = object()
    assert asyncio.run(read(("ab",))) == ["ab", "x", error, "", None]
    assert asyncio.run(read(("bcd",))) == ["ab", "xa", error, "", "bc", None]
