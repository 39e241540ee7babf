"""What a text is: a stream of characters, conversations for a chat template, or a mixture of texts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from harness.errors import UserError

Message = dict[str, str]
Conversation = list[Message]


@dataclass(frozen=True)
class Text:
    """A stream of text, with its protocol: how it was made, to be reported with every result."""

    stream: str
    protocol: str
    windows: int | None = None  # the protocol evaluates only the first windows; None for all

    def checksum(self) -> str:
        """SHA-256 of the stream."""
        return hashlib.sha256(self.stream.encode()).hexdigest()


@dataclass(frozen=True)
class Chat:
    """Conversations, which the model's chat template turns into text, one after the other."""

    conversations: tuple[Conversation, ...]
    protocol: str
    windows: int | None = None

    def checksum(self) -> str:
        """SHA-256 of the conversations as JSON."""
        return hashlib.sha256(json.dumps(self.conversations).encode()).hexdigest()


@dataclass(frozen=True)
class Mixture:
    """Texts, each with its share of the windows. Shares sum to 1."""

    parts: tuple[tuple[float, Text | Chat], ...]

    @property
    def protocol(self) -> str:
        """The protocols of the parts with their shares."""
        return " + ".join(f"{share:.4g} of the windows: {text.protocol}" for share, text in self.parts)

    @property
    def windows(self) -> int | None:
        """Windows that are evaluated at most, so that no part has more than its own protocol evaluates."""
        limits = [int(text.windows / share) for share, text in self.parts if text.windows is not None]
        return min(limits, default=None)

    def checksum(self) -> str:
        """SHA-256 of the shares and checksums of the parts."""
        parts = [(share, text.checksum()) for share, text in self.parts]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


AnyText = Text | Chat | Mixture


def require_unicode(text: str, source: str) -> None:
    """Refuse text with a lone surrogate: JSON files and command lines may hold one, tokenizers reject it.

    Raises
    ------
    UserError
        If `text` has a lone surrogate; the message gives its position in `source`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise UserError(
            f"{source} is not valid Unicode: character {error.start} is {code}, a lone surrogate"
        ) from None


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, each with a role and a text."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )
