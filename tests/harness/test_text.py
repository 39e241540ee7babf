"""Text, its splits and joining, and the windows cut from it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from harness import text
from harness.errors import UserError

WIKITEXT_TEST = Path(__file__).parents[3] / "shared" / "data" / "wikitext2" / "wiki.test.raw"


def test_rows_of_wikitext_keep_their_newline_and_blank_lines_are_empty(tmp_path: Path) -> None:
    file = tmp_path / "wiki.raw"
    file.write_text(" \n = Title = \n \n A row. \n")
    read = text.read_text(f"wikitext2:{file}", text.EVALUATION)
    assert read.stream == "\n\n = Title = \n\n\n\n\n A row. \n"
    assert "4 rows" in read.protocol


@pytest.mark.skipif(not WIKITEXT_TEST.is_file(), reason="WikiText-2 is not beside the project")
def test_wikitext_test_split_has_the_published_number_of_rows() -> None:
    assert "4358 rows" in text.read_text(f"wikitext2:{WIKITEXT_TEST}", text.EVALUATION).protocol


def test_c4_evaluation_takes_1100_documents_joined_by_spaces(tmp_path: Path) -> None:
    file = tmp_path / "c4.jsonl"
    file.write_text("".join(json.dumps({"text": f"d{i}"}) + "\n" for i in range(1200)))
    read = text.read_text(f"c4:{file}", text.EVALUATION)
    assert read.stream == " ".join(f"d{i}" for i in range(1100))
    assert read.windows == 256
    assert text.read_text(f"c4:{file}", text.CALIBRATION).stream.startswith("d0\n\nd1\n\n")


def test_ptb_lines_are_stripped_and_joined_by_spaces(tmp_path: Path) -> None:
    file = tmp_path / "ptb.test.txt"
    file.write_text(" no it was n't \n <unk> and N \n")
    assert text.read_text(f"ptb:{file}", text.EVALUATION).stream == "no it was n't <unk> and N"


def test_a_plain_text_file_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\n\n two \n")
    assert text.read_text(str(file), text.CALIBRATION).stream == "one\n\n two \n"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow stream", "arrow file"])
def test_tables_give_their_column(tmp_path: Path, kind: str) -> None:
    file = write_table(tmp_path, kind, {"text": ["a", "b"], "body": ["c", "d"]})
    assert text.read_text(str(file), text.CALIBRATION).stream == "a\n\nb"
    assert text.read_text(str(file), text.CALIBRATION, "body").stream == "c\n\nd"
    with pytest.raises(UserError, match=r"'summary'.*text, body"):
        text.read_text(str(file), text.CALIBRATION, "summary")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_that_is_not_text_is_refused(tmp_path: Path, kind: str) -> None:
    file = write_table(tmp_path, kind, {"text": [1, 2]})
    with pytest.raises(UserError, match=r"'text'.* is not text"):
        text.read_text(str(file), text.CALIBRATION)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "contains no text"),
        ("blank.txt", b" \n\n", "contains no text"),
        ("empty.jsonl", b"", "contains no text"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("list.jsonl", b"[1]\n", "line 1 has no field 'text'"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("half.jsonl", b'{"text": "a \\ud83d b"}\n', "character 2 is U.D83D, a lone surrogate"),
        ("broken.parquet", b"PAR1nothing", "cannot be read"),
        ("broken.arrow", b"ARROW1nothing", "cannot be read"),
        ("data.tsv", b"a,b", "text files end in .txt"),
        ("rows.json", b'{"text": "a"}\n', "text files end in .txt"),  # rows, or one text? Nothing says.
        ("data.csv", b"a,b\n1,2\n", "has no column 'text' .found: a, b."),
        ("short.csv", b"a,text\n1,2\n3\n", "line 3 has no column 'text'"),
        ("quote.csv", b'text\n"a\n', "is not CSV"),
        *(
            (f"text.txt{ending}", b"zipped", "is compressed; decompress it first")
            for ending in text.COMPRESSED
        ),
    ],
)
def test_files_that_hold_no_text_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        text.read_text(str(tmp_path / name), text.CALIBRATION)
    assert name in str(error.value)


ROWS = ["w1 w2", 'a "b", c', "d"]


@pytest.mark.parametrize("name", ["", "c4", "ptb", "wikitext2"])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".gz"])
def test_a_file_is_read_by_its_kind_whatever_data_set_it_is_of(
    name: str, ending: str, tmp_path: Path
) -> None:
    """Never as plain text: braces and quotes of the file format are no text."""
    column = text.DATA_SETS[name].column if name else "text"
    file = tmp_path / f"rows{ending}"
    if ending == ".csv":
        with file.open("w", newline="") as to:
            writer = csv.DictWriter(to, ["n", column])
            writer.writeheader()
            writer.writerows({"n": 1, column: row} for row in ROWS)
    else:
        file.write_text("".join(json.dumps({"n": 1, column: row}) + "\n" for row in ROWS))
    source = f"{name}:{file}" if name else str(file)
    if ending in (".tsv", ".gz") or (ending == ".json" and not name):
        with pytest.raises(UserError, match=rf"rows\{ending} (has an unknown file type|is compressed)"):
            text.read_text(source, text.CALIBRATION)
        return
    joiner = text.DATA_SETS[name].splits[text.CALIBRATION].joiner if name else "\n\n"
    assert text.read_text(source, text.CALIBRATION).stream == joiner.join(ROWS)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(UserError, match=r"wikitext3 is not a file.*wikitext2"):
        text.read_text("wikitext3", text.CALIBRATION)


def test_builtin_text_is_split_without_overlap() -> None:
    calibration = text.read_text(text.BUILTIN, text.CALIBRATION).stream
    evaluation = text.read_text(text.BUILTIN, text.EVALUATION).stream
    assert 0.15 < len(evaluation) / (len(calibration) + len(evaluation)) < 0.25
    assert evaluation[:500] not in calibration


def write_table(folder: Path, kind: str, columns: dict[str, list]) -> Path:
    suffix = kind.split()[0]
    file = folder / f"table.{suffix}"
    if suffix == "jsonl":
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file
    import pyarrow
    from pyarrow import ipc, parquet

    table = pyarrow.table(columns)
    if kind == "parquet":
        parquet.write_table(table, file)
    else:
        writer = ipc.new_stream if kind == "arrow stream" else ipc.new_file
        with writer(file, table.schema) as sink:
            sink.write_table(table)
    return file
