"""Text for calibration and evaluation: named data sets, local files, and Python's own documentation."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.models.original import is_verbose

CALIBRATION, EVALUATION = "calibration", "evaluation"
BUILTIN = "builtin"

# Suffixes of plain text files; "" stands for no suffix.
PLAIN = (".txt", ".raw", ".md", "")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip")

# Topics that begin after this share of the built-in text are held out for evaluation.
HELD_OUT_FROM = 0.8


@dataclass(frozen=True)
class _Split:
    hub: dict[str, Any]  # arguments of datasets.load_dataset
    joiner: str
    rows: int | None = None  # use only the first rows; None for all
    windows: int | None = None  # evaluate only the first windows; None for all


@dataclass(frozen=True)
class _DataSet:
    column: str
    keeps_newline: bool  # whether a row of the published text file ends with its newline
    splits: dict[str, _Split]


_C4 = {"path": "allenai/c4", "streaming": True, "split": "train"}
_PTB = {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"}
_WIKITEXT2 = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}

# Splits, joiners and sizes follow the GPTQ family, so that perplexities are comparable.
DATA_SETS = {
    "wikitext2": _DataSet(
        "text",
        True,
        {
            CALIBRATION: _Split({**_WIKITEXT2, "split": "train"}, "\n\n"),
            EVALUATION: _Split({**_WIKITEXT2, "split": "test"}, "\n\n"),
        },
    ),
    "c4": _DataSet(
        "text",
        False,
        {
            CALIBRATION: _Split(
                {**_C4, "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}, "\n\n", rows=20000
            ),
            EVALUATION: _Split(
                {**_C4, "data_files": {"train": "en/c4-validation.00000-of-00008.json.gz"}},
                " ",
                rows=1100,
                windows=256,
            ),
        },
    ),
    "ptb": _DataSet(
        "sentence",
        False,
        {
            CALIBRATION: _Split({**_PTB, "split": "train"}, " "),
            EVALUATION: _Split({**_PTB, "split": "test"}, " "),
        },
    ),
}

SOURCES_HELP = (
    "wikitext2, c4 or ptb, downloaded with the package `datasets`; NAME:FILE for a local copy of such a "
    "data set, such as wikitext2:wiki.test.raw; a .txt, .jsonl, .csv, .parquet or .arrow file; or "
    f"{BUILTIN}, the documentation that comes with Python"
)


@dataclass(frozen=True)
class Text:
    """A stream of text, with its protocol: how it was made, to be reported with every result."""

    stream: str
    protocol: str
    windows: int | None = None  # the protocol evaluates only the first windows; None for all

    def checksum(self) -> str:
        """SHA-256 of the stream."""
        return hashlib.sha256(self.stream.encode()).hexdigest()


def read_text(source: str, use: str, column: str | None = None) -> Text:
    """Read text by name or from a file.

    Parameters
    ----------
    source : str
        One of the sources in `SOURCES_HELP`.
    use : {"calibration", "evaluation"}
        Selects the split of a named data set, or the part of the built-in text.
    column : str, optional
        Field to read from the rows of a .jsonl, .csv, .parquet or .arrow file. By default the field of the
        named data set, or ``text``.

    Raises
    ------
    UserError
        If the file is missing, empty or of an unknown type, if it lacks the column, or if a data set
        cannot be downloaded.
    """
    if not source:
        raise UserError("the name of the text is empty; is a shell variable unset?")
    if source == BUILTIN:
        text = _builtin(use)
    elif source in DATA_SETS:
        text = _downloaded(source, use)
    else:
        name, colon, path = source.partition(":")
        if not (colon and name in DATA_SETS):
            name, path = "", source
        elif not path:
            raise UserError(f"{source} has no file name after the colon; is a shell variable unset?")
        text = _local(name, Path(path), use, column)
    if not text.stream.strip():
        raise UserError(f"{source} contains no text")
    require_unicode(text.stream, source)
    return text


def require_rows(column: str | None, *sources: str) -> None:
    """Refuse ``--text-column`` if no source has rows with fields."""
    if column is not None and not any(Path(source).suffix.lower() in READERS for source in sources):
        raise UserError(
            f"--text-column {column} applies only to {', '.join(READERS)} files, and no such file is given; "
            "drop --text-column"
        )


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


def _downloaded(name: str, use: str) -> Text:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"downloading {name} requires the package `datasets`; run pip install '.[eval]' in the clone, "
            f"or pass a local copy as {name}:FILE"
        ) from None
    if not is_verbose():
        datasets.disable_progress_bars()
    data_set = DATA_SETS[name]
    split = data_set.splits[use]
    try:
        loaded = datasets.load_dataset(**split.hub)
        rows = loaded.take(split.rows) if split.rows else loaded
        texts = [row[data_set.column] for row in rows]
    except Exception as error:  # errors of the hub share no base class
        raise UserError(
            f"{name} could not be downloaded ({type(error).__name__}: {_first_line(error)}); "
            f"without access to the Hugging Face Hub, pass a local copy as {name}:FILE"
        ) from None
    return _joined(texts, name, use, f"{split.hub['path']}, {split.hub['split']} split")


def _local(name: str, path: Path, use: str, column: str | None) -> Text:
    if not path.is_file():
        known = ", ".join([*DATA_SETS, BUILTIN])
        raise UserError(f"{path} is not a file; use one of {known}, or an existing file")
    column = column or (DATA_SETS[name].column if name else "text")
    suffix = path.suffix.lower()
    try:
        if suffix in READERS or (name and suffix == ".json"):  # data sets publish lines of JSON as .json
            rows = list(READERS.get(suffix, _jsonl_rows)(path, column))
        elif suffix in PLAIN and name:
            rows = list(_text_rows(path, DATA_SETS[name].keeps_newline))
        elif suffix in PLAIN:
            return Text(path.read_bytes().decode("utf-8-sig"), f"{path.name} as it is")
        elif suffix in COMPRESSED:
            raise UserError(f"{path} is compressed; decompress it first")
        else:
            endings = ", ".join(filter(None, (*PLAIN, *READERS)))
            raise UserError(f"{path} has an unknown file type; text files end in {endings}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {_first_line(error)}") from None
    return _joined(rows, name, use, path.name)


def _joined(rows: list[str], name: str, use: str, origin: str) -> Text:
    split = DATA_SETS[name].splits[use] if name else _Split({}, "\n\n")
    rows = rows[: split.rows]
    protocol = f"{origin}, {len(rows)} rows joined by {split.joiner!r}"
    return Text(split.joiner.join(rows), f"{name}: {protocol}" if name else protocol, split.windows)


def _text_rows(path: Path, keeps_newline: bool) -> Iterable[str]:
    """Read the rows of a published text file, in which a line of one space is an empty row."""
    with path.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if keeps_newline:
                yield "" if line.rstrip("\n") == " " else line
            else:
                yield line.strip()


def _jsonl_rows(path: Path, column: str) -> Iterable[str]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error.msg}") from None
            if not isinstance(row, dict) or column not in row:
                fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise UserError(
                    f"{path}, line {number} has no field {column!r} (found: {fields}); "
                    "choose the field with --text-column"
                )
            if not isinstance(row[column], str):
                raise UserError(f"{path}, line {number}: field {column!r} is not text")
            yield row[column]


def _parquet_rows(path: Path, column: str) -> Iterable[str]:
    from_file = _pyarrow("parquet")
    return _table_rows(path, column, lambda: from_file.read_table(path))


def _arrow_rows(path: Path, column: str) -> Iterable[str]:
    ipc = _pyarrow("ipc")

    def read() -> Any:
        # `datasets` writes the stream format, others the file format; only the latter has a magic number.
        with path.open("rb") as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            return (ipc.open_file if is_file else ipc.open_stream)(file).read_all()

    return _table_rows(path, column, read)


def _csv_rows(path: Path, column: str) -> Iterable[str]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines, strict=True)
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


READERS: dict[str, Callable[[Path, str], Iterable[str]]] = {
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}


def _table_rows(path: Path, column: str, read: Any) -> Iterable[str]:
    import pyarrow

    try:
        table = read()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read: {_first_line(error)}") from None
    if column not in table.column_names:
        raise UserError(
            f"{path} has no column {column!r} (found: {', '.join(table.column_names)}); "
            "choose the column with --text-column"
        )
    rows = table.column(column).to_pylist()
    if not all(isinstance(row, str) for row in rows):
        raise UserError(f"{path}: column {column!r} is not text in every row")
    return rows


def _pyarrow(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError:
        raise UserError(
            "reading .parquet and .arrow files requires the package `pyarrow`; "
            "run pip install '.[eval]' in the clone"
        ) from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
