"""Text for calibration and evaluation: named data sets, local files, and what every machine has."""

from __future__ import annotations

import itertools
import json
import platform
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.errors import UserError

CALIBRATION, EVALUATION = "calibration", "evaluation"


BUILTIN = "builtin"


# Endings of files that are text as they are; the empty one for files without.
PLAIN = (".txt", ".raw", ".md", "")


# Topics of the built-in text that begin beyond this share of it are kept for evaluation.
HELD_OUT_FROM = 0.8


@dataclass(frozen=True)
class _Split:
    hub: dict[str, Any]  # arguments of datasets.load_dataset
    joiner: str
    rows: int | None = None  # leading rows taken; None for all
    windows: int | None = None  # leading evaluation windows taken; None for all


@dataclass(frozen=True)
class _DataSet:
    column: str
    keeps_newline: bool  # whether a row of the published text file ends with its newline
    splits: dict[str, _Split]


_C4 = {"path": "allenai/c4", "streaming": True, "split": "train"}


_PTB = {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"}


_WIKITEXT2 = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}


# Splits, joining and sizes are those of the GPTQ family, so that numbers can be compared.
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
    "wikitext2, c4 or ptb (downloaded with the package `datasets`); NAME:FILE for a local file read with "
    "that data set's rows and joining, such as wikitext2:wiki.test.raw; a .txt, .jsonl, .parquet or "
    f".arrow file; or {BUILTIN}, text of the Python documentation that every machine has"
)


@dataclass(frozen=True)
class Text:
    """A stream of text and how it came about, in words that belong beside every number made with it."""

    stream: str
    protocol: str
    windows: int | None = None  # leading evaluation windows the protocol takes; None for all


def read_text(source: str, use: str, column: str | None = None) -> Text:
    """Read text by name or from a file.

    Parameters
    ----------
    source : str
        As `SOURCES_HELP` says.
    use : {"calibration", "evaluation"}
        Which split of a named data set, or share of the built-in text.
    column : str, optional
        Field of the rows of a .jsonl, .parquet or .arrow file; the data set's own, or ``text``.

    Raises
    ------
    UserError
        If the file is missing, empty, of an unknown kind or has no such column, or a data set
        cannot be downloaded.
    """
    if not source:
        raise UserError("the name of a text is empty: a variable that is not set?")
    if source == BUILTIN:
        text = _builtin(use)
    elif source in DATA_SETS:
        text = _downloaded(source, use)
    else:
        name, colon, path = source.partition(":")
        if not (colon and name in DATA_SETS):
            name, path = "", source
        elif not path:
            raise UserError(f"{source} names no file after the colon: a variable that is not set?")
        text = _local(name, Path(path), use, column)
    if not text.stream.strip():
        raise UserError(f"{source} holds no text")
    require_unicode(text.stream, source)
    return text


def require_rows(column: str | None, *sources: str) -> None:
    """Refuse the name of a field where no text comes in rows with fields."""
    if column is not None and not any(Path(source).suffix.lower() in READERS for source in sources):
        raise UserError(
            f"--text-column {column} is for rows of {', '.join(READERS)} files, and there are none here; "
            "leave it out"
        )


def require_unicode(text: str, source: str) -> None:
    """Refuse half a surrogate pair, which JSON may hold and a command line may make; no tokenizer takes it.

    Raises
    ------
    UserError
        If `text` has one; says where in `source`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise UserError(
            f"{source} is not Unicode text: character {error.start} is {code}, half a pair"
        ) from None


def tokenize(text: Text, tokenizer: Any) -> torch.Tensor:
    """The token ids of the whole stream, (tokens,), exactly as the tokenizer gives them."""
    return tokenizer(text.stream, return_tensors="pt", verbose=False).input_ids[0]


def calibration_windows(tokens: torch.Tensor, nsamples: int, seqlen: int, seed: int) -> torch.Tensor:
    """Windows at random starts, (nsamples, seqlen), as the GPTQ family draws them.

    Raises
    ------
    UserError
        If there are fewer than seqlen + 1 tokens.
    """
    if len(tokens) < seqlen + 1:
        raise UserError(
            f"the calibration text has {len(tokens)} tokens; windows of {seqlen} need at least {seqlen + 1}. "
            "Use more text or a smaller --seqlen"
        )
    generator = random.Random(seed)
    starts = [generator.randint(0, len(tokens) - seqlen - 1) for _ in range(nsamples)]
    return torch.stack([tokens[s : s + seqlen] for s in starts])


def evaluation_windows(tokens: torch.Tensor, seqlen: int, limit: int | None) -> torch.Tensor:
    """Windows from the start that do not overlap, (windows, seqlen); the rest is left out.

    Raises
    ------
    UserError
        If there are fewer than seqlen tokens.
    """
    count = len(tokens) // seqlen
    if count == 0:
        raise UserError(
            f"the evaluation text has {len(tokens)} tokens, less than one window of {seqlen}. "
            "Use more text or shorter windows"
        )
    count = min(count, limit) if limit else count
    return tokens[: count * seqlen].reshape(count, seqlen)


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
            f"{name} is downloaded with the package `datasets`: pip install '.[eval]' in the clone, "
            f"or give a local copy as {name}:FILE"
        ) from None
    data_set = DATA_SETS[name]
    split = data_set.splits[use]
    try:
        loaded = datasets.load_dataset(**split.hub)
        rows = loaded.take(split.rows) if split.rows else loaded
        texts = [row[data_set.column] for row in rows]
    except Exception as error:  # the hub's failures share no base class
        raise UserError(
            f"{name} could not be downloaded ({type(error).__name__}: {_first_line(error)}). "
            f"Without a hub, give a local copy as {name}:FILE"
        ) from None
    return _joined(texts, name, use, f"{split.hub['path']}, {split.hub['split']} split")


def _local(name: str, path: Path, use: str, column: str | None) -> Text:
    if not path.is_file():
        known = ", ".join([*DATA_SETS, BUILTIN])
        raise UserError(f"{path} is not a file; text is one of {known}, or a file that exists")
    column = column or (DATA_SETS[name].column if name else "text")
    suffix = path.suffix.lower()
    try:
        if suffix in READERS:
            rows = list(READERS[suffix](path, column))
        elif name:
            rows = list(_text_rows(path, DATA_SETS[name].keeps_newline))
        elif suffix in PLAIN:
            return Text(path.read_bytes().decode("utf-8-sig"), f"{path.name} as it is")
        else:
            raise UserError(f"{path}: text files end in {', '.join(filter(None, (*PLAIN, *READERS)))}")
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
    """Rows of a published text file: a line of one space stands for the empty row."""
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
                    f"{path}, line {number} has no field {column!r} (it has: {fields}); "
                    "name one with --text-column"
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
        # `datasets` writes the stream format, others the file format; only the latter has a magic.
        with path.open("rb") as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            return (ipc.open_file if is_file else ipc.open_stream)(file).read_all()

    return _table_rows(path, column, read)


READERS: dict[str, Callable[[Path, str], Iterable[str]]] = {
    ".jsonl": _jsonl_rows,
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
            f"{path} has no column {column!r} (it has: {', '.join(table.column_names)}); "
            "name one with --text-column"
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
            "parquet and arrow files are read with the package `pyarrow`: pip install '.[eval]' in the clone"
        ) from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
