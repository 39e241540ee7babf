"""Read text by the name that a command line gives."""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Sequence
from pathlib import Path

from harness.errors import UserError
from harness.text.content import AnyText, Chat, Mixture, Text, require_unicode
from harness.text.published import DATA_SETS, EVALUATION, Split, download
from harness.text.rows import (
    COMPRESSED,
    PLAIN,
    READERS,
    Row,
    json_rows,
    kind,
    read_plain,
    text_rows,
)
from harness.words import counted

BUILTIN = "builtin"

# Topics that begin after this share of the built-in text are held out for evaluation.
HELD_OUT_FROM = 0.8

# Shares are decimal fractions: three times 0.333 is near enough.
SHARES_TOLERANCE = 2e-3

SOURCES_HELP = (
    "wikitext2, c4 or ptb, downloaded with the package `datasets`; NAME:FILE for a local copy of such a "
    "data set, such as wikitext2:wiki.test.raw; a .txt, .jsonl, .csv, .parquet or .arrow file, whose rows "
    "hold text, or conversations (a field `messages`) for the model's chat template; such a file compressed "
    "as .gz or .zst; a folder of such files; a mixture, such as wikitext2:0.5,chat.jsonl:0.5, with the share "
    f"of the windows that each text gives; or {BUILTIN}, the documentation that comes with Python"
)


def read_text(source: str, use: str, column: str | None = None) -> AnyText:
    """Read text by name or from a file.

    Parameters
    ----------
    source : str
        One of the sources in `SOURCES_HELP`.
    use : {"calibration", "evaluation"}
        Selects the split of a named data set, or the part of the built-in text.
    column : str, optional
        Field to read from the rows of a .jsonl, .csv, .parquet or .arrow file. By default the field of the
        named data set, or ``text`` or ``messages``, whichever the first row has.

    Raises
    ------
    UserError
        If the file is missing, empty, damaged or of an unknown type, if it lacks the column, if it can be
        read in two ways, or if a data set cannot be downloaded.
    """
    shares = _shares(source)
    if shares:
        return Mixture(tuple((share, _read_one(name, use, column)) for name, share in shares.items()))
    return _read_one(source, use, column)


def require_rows(column: str | None, *sources: str) -> None:
    """Refuse ``--text-column`` if no source has rows with fields."""
    names = itertools.chain.from_iterable(_shares(source) or [source] for source in sources)
    if column is not None and not any(kind(Path(n)) in READERS or _path_of(n)[1].is_dir() for n in names):
        raise UserError(
            f"--text-column {column} applies only to {', '.join(READERS)} files, and no such file is given; "
            "drop --text-column"
        )


def _shares(source: str) -> dict[str, float]:
    """Return the shares of a mixture by source; none if `source` is not a mixture."""
    if "," not in source or Path(source).exists():
        return {}
    shares: dict[str, float] = {}
    for part in source.split(","):
        name, _, number = part.strip().rpartition(":")
        try:
            share = float(number)
        except ValueError:
            share = 0.0
        if not name or not 0 < share < 1:
            raise UserError(
                f"{source} is no file, and no mixture: {part!r} does not end in a share between 0 and 1. "
                "A mixture is written as a.txt:0.5,b.txt:0.5"
            )
        if name in shares:
            raise UserError(f"{source} names {name} twice; add up its shares")
        shares[name] = share
    total = sum(shares.values())
    if abs(total - 1) > SHARES_TOLERANCE:
        raise UserError(f"the shares of {source} sum to {total:g}, but must sum to 1")
    return {name: share / total for name, share in shares.items()}


def _read_one(source: str, use: str, column: str | None) -> Text | Chat:
    if not source:
        raise UserError("the name of the text is empty; is a shell variable unset?")
    if source == BUILTIN:
        text: Text | Chat = _builtin(use)
    elif source in DATA_SETS:
        split = DATA_SETS[source].splits[use]
        text = _joined(download(source, use), source, use, f"{split.hub['path']}, {split.hub['split']} split")
    else:
        text = _local(*_path_of(source), use, column)
    content = text.stream if isinstance(text, Text) else json.dumps(text.conversations, ensure_ascii=False)
    if not content.strip():
        raise UserError(f"{source} contains no text")
    require_unicode(content, source)
    return text


def _path_of(source: str) -> tuple[str, Path]:
    """Split NAME:FILE; the name is empty if the source is only a file."""
    name, colon, path = source.partition(":")
    if not (colon and name in DATA_SETS):
        return "", Path(source)
    if not path:
        raise UserError(f"{source} has no file name after the colon; is a shell variable unset?")
    return name, Path(path)


def _builtin(use: str) -> Text:
    from pydoc_data import topics

    keys = sorted(topics.topics)
    starts = itertools.accumulate((len(topics.topics[k]) for k in keys), initial=0)
    boundary = HELD_OUT_FROM * sum(map(len, topics.topics.values()))
    chosen = [k for k, start in zip(keys, starts, strict=False) if (start >= boundary) == (use == EVALUATION)]
    return Text(
        "\n\n".join(topics.topics[k] for k in chosen),
        f"Python {platform.python_version()} documentation, topics {chosen[0]!r} to {chosen[-1]!r} of "
        "pydoc_data, joined by '\\n\\n'",
    )


def _local(name: str, path: Path, use: str, column: str | None) -> Text | Chat:
    column = column or (DATA_SETS[name].column if name else None)
    if path.is_dir():
        # Hidden files are the system's, not the user's.
        inside = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
        files = sorted(file for file in inside if not any(part.startswith(".") for part in file.parts))
        if not files:
            raise UserError(f"{path} contains no text")
        rows = [row for file in files for row in _rows_of(name, path / file, column)]
        return _joined(rows, name, use, f"{path.name}, {counted(len(files), 'file')}")
    if not path.is_file():
        known = ", ".join([*DATA_SETS, BUILTIN])
        raise UserError(f"{path} is not a file; use one of {known}, or an existing file")
    if kind(path) in PLAIN and not name:
        return Text(read_plain(path), f"{path.name} as it is")
    return _joined(_rows_of(name, path, column), name, use, path.name)


def _rows_of(name: str, path: Path, column: str | None) -> list[Row]:
    """Read the rows of a file; a plain text file of no data set is one row."""
    suffix = kind(path)
    if suffix in READERS:
        return list(READERS[suffix](path, column))
    if suffix == ".json" and name:  # data sets publish lines of JSON as .json
        return list(json_rows(path, column))
    if suffix in PLAIN:
        return list(text_rows(path, DATA_SETS[name].keeps_newline)) if name else [read_plain(path)]
    if suffix in COMPRESSED:
        raise UserError(f"{path} is compressed; decompress it first")
    endings = ", ".join(filter(None, (*PLAIN, *READERS)))
    hint = "; name lines of JSON .jsonl" if suffix == ".json" else ""
    raise UserError(
        f"{path} has an unknown file type; text files end in {endings}, if compressed with .gz or .zst "
        f"after that{hint}"
    )


def _joined(rows: Sequence[Row], name: str, use: str, origin: str) -> Text | Chat:
    split = DATA_SETS[name].splits[use] if name else Split({}, "\n\n")
    rows = rows[: split.rows]
    text = [row for row in rows if isinstance(row, str)]
    conversations = [row for row in rows if not isinstance(row, str)]
    if text and conversations:
        raise UserError(f"{origin} holds text in some rows and conversations in others; split it")
    if conversations:
        return Chat(
            tuple(conversations),
            f"{origin}, {counted(len(rows), 'conversation')} by the model's chat template",
        )
    protocol = f"{origin}, {counted(len(rows), 'row')} joined by {split.joiner!r}"
    return Text(split.joiner.join(text), f"{name}: {protocol}" if name else protocol, split.windows)
