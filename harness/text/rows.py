"""Files of rows, one field of which holds text or a conversation; plain text; both compressed or not."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from harness.errors import UserError
from harness.text.content import Conversation, is_conversation

Row = str | Conversation

# Fields that are read unless another is asked for: of text, and of conversations.
TEXT, MESSAGES = "text", "messages"

# Suffixes of plain text files; "" stands for no suffix.
PLAIN = (".txt", ".raw", ".md", "")
# Suffixes of compressed files: of those that are read, and of others.
GZIP, ZSTANDARD = READ_COMPRESSED = (".gz", ".zst")
COMPRESSED = (".bz2", ".xz", ".lz4", ".zip")


def kind(path: Path) -> str:
    """Return the suffix that tells the kind of a file: ".jsonl" for rows.jsonl.gz, but ".gz" for rows.gz."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower() or suffix) if suffix in READ_COMPRESSED else suffix


@contextmanager
def open_binary(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed.

    Raises
    ------
    UserError
        If it cannot be read, is damaged, or holds something other than UTF-8 text.
    """
    damage: tuple[type[Exception], ...] = (zlib.error, EOFError)
    opener: Callable[..., Any] = open
    if path.suffix.lower() == GZIP:
        opener = gzip.open
    elif path.suffix.lower() == ZSTANDARD:
        zstandard = _zstandard()
        opener, damage = zstandard.open, (*damage, zstandard.ZstdError)
    try:
        with opener(path, "rb") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except gzip.BadGzipFile as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    except damage as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from None


def read_plain(path: Path) -> str:
    """Read a whole file of text, as it is."""
    with open_binary(path) as stream:
        return stream.read().decode("utf-8-sig")


def text_rows(path: Path, keeps_newline: bool) -> Iterable[str]:
    """Read the rows of a published text file, in which a line of one space is an empty row."""
    for line in _lines(path):
        if keeps_newline:
            yield "" if line.rstrip("\n") == " " else line
        else:
            yield line.strip()


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Read the values in a file of one JSON value per line, each with the number of its line.

    Raises
    ------
    UserError
        If the file cannot be read, or a line is not JSON.
    """
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error.msg}") from None


def json_rows(path: Path, column: str | None) -> Iterable[Row]:
    """Read one field of the rows of a file of JSON lines."""
    for number, row in json_lines(path):
        fields = row if isinstance(row, dict) else {}
        column = column or default_column(fields, path)
        if column not in fields:
            found = ", ".join(fields) if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"{path}, line {number} has no field {column!r} (found: {found}); "
                "choose the field with --text-column"
            )
        if not _is_row(fields[column]):
            raise UserError(f"{path}, line {number}: field {column!r} {_NEITHER}")
        yield fields[column]


def default_column(fields: Iterable[str], path: Path) -> str:
    """Choose the field to read of a file whose first row has these fields."""
    if TEXT in fields and MESSAGES in fields:
        raise UserError(f"{path} has {TEXT!r} and {MESSAGES!r}; choose one with --text-column")
    return MESSAGES if MESSAGES in fields else TEXT


def _is_row(value: Any) -> bool:
    return isinstance(value, str) or is_conversation(value)


_NEITHER = "is not text, nor a list of messages with 'role' and 'content'"


def _lines(path: Path, newline: str | None = None) -> Iterator[str]:
    with open_binary(path) as stream:
        yield from io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


def _parquet_rows(path: Path, column: str | None) -> Iterable[Row]:
    from_file = _pyarrow("parquet")
    return _table_rows(path, column, from_file.read_table)


def _arrow_rows(path: Path, column: str | None) -> Iterable[Row]:
    ipc = _pyarrow("ipc")

    def read(file: IO[bytes]) -> Any:
        # `datasets` writes the stream format, others the file format; only the latter has a magic number.
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        return (ipc.open_file if is_file else ipc.open_stream)(file).read_all()

    return _table_rows(path, column, read)


def _csv_rows(path: Path, column: str | None) -> Iterable[Row]:
    rows = csv.DictReader(_lines(path, newline=""), strict=True)
    column = column or TEXT
    if column not in (rows.fieldnames or ()):
        raise UserError(
            f"{path} has no column {column!r} (found: {', '.join(rows.fieldnames or ())}); "
            "choose the column with --text-column"
        )
    try:
        for row in rows:
            if row[column] is None:
                raise UserError(f"{path}, line {rows.line_num} has no column {column!r}")
            yield row[column]
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num} is not CSV: {error}") from None


READERS: dict[str, Callable[[Path, str | None], Iterable[Row]]] = {
    ".jsonl": json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}


def _table_rows(path: Path, column: str | None, read: Callable[[IO[bytes]], Any]) -> Iterable[Row]:
    import pyarrow

    try:
        with open_binary(path) as file:
            table = read(file)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    column = column or default_column(table.column_names, path)
    if column not in table.column_names:
        raise UserError(
            f"{path} has no column {column!r} (found: {', '.join(table.column_names)}); "
            "choose the column with --text-column"
        )
    rows = table.column(column).to_pylist()
    if not all(map(_is_row, rows)):
        raise UserError(f"{path}: column {column!r} {_NEITHER}, in every row")
    return rows


def _pyarrow(module: str) -> Any:
    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError:
        raise UserError(
            "reading .parquet and .arrow files requires the package `pyarrow`; "
            "run pip install '.[eval]' in the clone"
        ) from None


def _zstandard() -> Any:
    """Python's own module, or its backport, which also refuses a file that is cut off."""
    for name in ("compression.zstd", "backports.zstd"):  # Python has its own since 3.14
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise UserError(
        "reading .zst files requires Python 3.14 or the package `backports.zstd`; "
        "run pip install '.[eval]' in the clone"
    )


def first_line(error: BaseException) -> str:
    """First line of an error's message."""
    return str(error).strip().split("\n")[0]
