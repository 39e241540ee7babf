"""Stop texts: what comes before them is the answer."""

from __future__ import annotations


def cut(text: str, stops: tuple[str, ...]) -> str:
    """Return a text up to the first stop text."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=None)]


class UntilStop:
    """Passes on the pieces of a text as they come, up to the first stop text.

    What may be the beginning of a stop text is held back until more of the text is known.

    Parameters
    ----------
    stops : tuple of str
        Texts that end the text; none is empty.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self._text, self._passed = "", 0

    def take(self, piece: str, last: bool = False) -> str:
        """Take the next piece, and return what can be passed on; after the last piece, all that is left."""
        self._text += piece
        end = len(cut(self._text, self.stops))
        if end == len(self._text) and not last:
            end -= max((_overlap(self._text, stop) for stop in self.stops), default=0)
        start, self._passed = self._passed, max(self._passed, end)
        return self._text[start:end]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that is a proper beginning of a stop text."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
