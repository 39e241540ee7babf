"""Text, its splits and joining, and the windows cut from it."""

from __future__ import annotations

import csv
import gzip
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
        (
            "rows.json",
            b'{"text": "a"}\n',
            "unknown file type.*name lines of JSON .jsonl",
        ),  # rows, or one text? Nothing says.
        ("data.csv", b"a,b\n1,2\n", "has no column 'text' .found: a, b."),
        ("short.csv", b"a,text\n1,2\n3\n", "line 3 has no column 'text'"),
        ("quote.csv", b'text\n"a\n', "is not CSV"),
        *(
            (f"text.txt{ending}", b"zipped", "is compressed; decompress it first")
            for ending in text.COMPRESSED
        ),
        ("text.txt.gz", b"zipped", "is damaged: Not a gzipped file"),
        ("text.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:-20], "is damaged"),
        ("latin.txt.gz", gzip.compress(b"caf\xe9", mtime=0), "not UTF-8"),
        ("bad.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": \n', mtime=0), "line 2 is not JSON"),
        (
            "two.jsonl",
            b'{"text": "a", "messages": []}\n',
            "has 'text' and 'messages'; choose one with --text",
        ),
        (
            "empty.jsonl",
            b'{"messages": []}\n',
            "line 1: field 'messages' is not text, nor a list of messages",
        ),
        ("from.jsonl", b'{"messages": [{"from": "human", "value": "a"}]}\n', "with 'role' and 'content'"),
        ("half.jsonl", b'{"messages": [{"role": "user", "content": "\\ud83d"}]}\n', "a lone surrogate"),
        (
            "both.jsonl",
            b'{"messages": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n',
            "holds text in some rows and conversations in others",
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
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".gz", ".zip"])
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
    if ending in (".tsv", ".gz", ".zip") or (ending == ".json" and not name):
        with pytest.raises(UserError, match=rf"rows\{ending} (has an unknown file type|is compressed)"):
            text.read_text(source, text.CALIBRATION)
        return
    joiner = text.DATA_SETS[name].splits[text.CALIBRATION].joiner if name else "\n\n"
    assert text.read_text(source, text.CALIBRATION).stream == joiner.join(ROWS)


def test_compressed_files_are_read_by_what_is_inside(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": row}) + "\n" for row in ROWS).encode()
    (tmp_path / "c4-train.00000.json.gz").write_bytes(gzip.compress(rows, mtime=0))
    (tmp_path / "wiki.raw.gz").write_bytes(gzip.compress(b" \n A row. \n", mtime=0))
    (tmp_path / "a.txt.GZ").write_bytes(gzip.compress(b"as it\r\nis", mtime=0))
    c4 = text.read_text(f"c4:{tmp_path / 'c4-train.00000.json.gz'}", text.CALIBRATION)
    assert c4.stream == "\n\n".join(ROWS)
    wiki = text.read_text(f"wikitext2:{tmp_path / 'wiki.raw.gz'}", text.EVALUATION)
    assert wiki.stream == "\n\n A row. \n"
    assert text.read_text(str(tmp_path / "a.txt.GZ"), text.CALIBRATION).stream == "as it\r\nis"


def test_zstandard_files_are_read(tmp_path: Path) -> None:
    zstd = pytest.importorskip("backports.zstd", reason="not installed: pip install '.[eval]'")
    content = "".join(json.dumps({"text": words}) + "\n" for words in ("a b", "c d")).encode()
    file = tmp_path / "rows.jsonl.zst"
    file.write_bytes(zstd.compress(content))
    assert text.read_text(str(file), text.CALIBRATION).stream == "a b\n\nc d"
    for damaged in (b"no frame", zstd.compress(b"text " * 1000)[:-3]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"rows.jsonl.zst is damaged"):
            text.read_text(str(file), text.CALIBRATION)


def test_conversations_are_read_from_the_field_that_holds_them(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = tmp_path / "chat.jsonl"
    file.write_text(
        "".join(json.dumps({"id": i, "messages": turns, "chat": turns[:1]}) + "\n" for i in (0, 1))
    )
    read = text.read_text(str(file), text.CALIBRATION)
    assert read.conversations == (turns, turns)
    assert read.protocol == "chat.jsonl, 2 conversations by the model's chat template"
    assert text.read_text(str(file), text.CALIBRATION, "chat").conversations == (turns[:1], turns[:1])


def test_a_folder_gives_all_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "c.txt").write_text("third")
    (folder / "a.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    (folder / "b" / "z.md.gz").write_bytes(gzip.compress(b"between", mtime=0))
    (folder / ".DS_Store").write_bytes(b"\xff")
    read = text.read_text(str(folder), text.CALIBRATION)
    assert read.stream == "first\n\nsecond\n\nbetween\n\nthird"
    assert read.protocol == "texts, 3 files, 4 rows joined by '\\n\\n'"
    text.require_rows("text", str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config.json has an unknown file type"):
        text.read_text(str(folder), text.CALIBRATION)


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no text"):
        text.read_text(str(tmp_path), text.CALIBRATION)


def test_a_mixture_has_the_protocol_of_its_parts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "c4.jsonl").write_text('{"text": "b"}\n')
    source = f"{tmp_path / 'a.txt'}:0.25, c4:{tmp_path / 'c4.jsonl'}:0.75"
    read = text.read_text(source, text.EVALUATION)
    assert [(share, part.stream) for share, part in read.parts] == [(0.25, "a"), (0.75, "b")]
    assert read.protocol.startswith(
        "0.25 of the windows: a.txt as it is + 0.75 of the windows: c4: c4.jsonl, 1"
    )
    assert read.windows == 341  # 256 of C4, as its protocol has it, are three quarters
    text.require_rows("text", source)
    swapped = source.replace("0.25", "0.5").replace("0.75", "0.5")
    assert read.checksum() != text.read_text(swapped, text.EVALUATION).checksum()
    (tmp_path / "a,b.txt").write_text("one file")
    assert text.read_text(str(tmp_path / "a,b.txt"), text.CALIBRATION).stream == "one file"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("builtin,c4:0.5", "'builtin' does not end in a share between 0 and 1. A mixture is written as"),
        ("builtin:0.5,c4:x", "'c4:x' does not end in a share"),
        ("builtin:0.5,c4:nan", "'c4:nan' does not end in a share"),
        ("builtin:0.5,", "'' does not end in a share"),
        ("builtin:1,c4:0", "'builtin:1' does not end in a share"),
        ("builtin:0.5,builtin:0.5", "names builtin twice"),
        ("builtin:0.5,c4:0.4", "sum to 0.9, but must sum to 1"),
        ("builtin:0.5,nothing.txt:0.5", "nothing.txt is not a file"),
    ],
)
def test_mixtures_that_cannot_be_read_are_refused(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        text.read_text(source, text.CALIBRATION)


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
