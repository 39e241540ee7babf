"""Programs print any text to any stream, and finish what they do whether or not it is read."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import evaluate
from harness.cli import EXIT_USAGE
from harness.export.__main__ import main as export_main
from harness.files import json_text, read_json, write_json
from harness.inspect import main as inspect_main
from harness.models.folder import REPORT
from harness.quantize.__main__ import main as quantize_main
from tests.harness.conftest import SMALL

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]

NOT_UTF8 = os.fsdecode(b"caf\xe9")


def call(program: str, *arguments: object, **more: object) -> subprocess.CompletedProcess[bytes]:
    """Run a program as a shell would."""
    command = [sys.executable, "-m", f"harness.{program}", *map(str, arguments)]
    environment = {**os.environ, **more.pop("env", {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.run(command, env=environment, check=False, **streams)


def quantize_arguments(model: Path, text: Path, out: Path) -> list[object]:
    return [model, "--out", out, "--calibration", text, "--eval", text, "--eval-seqlen", 24, *SMALL]


def assert_complete(out: Path) -> None:
    record = json.loads((out / REPORT).read_text("utf-8"))
    assert record["perplexity"].keys() == {"before", "after"}
    assert record["peak_memory_bytes"] > 0


def stdout_in(encoding: str, patch: pytest.MonkeyPatch) -> io.TextIOWrapper:
    """stdout in an encoding; it fails on other characters, as Python's does."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    patch.setattr(sys, "stdout", stream)
    return stream


def printed(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "koi8-r"])
def test_a_run_prints_in_any_encoding(
    encoding: str,
    llama: Path,
    words_file: Path,
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The table at its end has characters that few encodings have."""
    stream = stdout_in(encoding, monkeypatch)
    assert run_main(quantize_main, *quantize_arguments(llama, words_file, tmp_path / "out")) == 0
    assert_complete(tmp_path / "out")
    assert "E_w / \\u2016W\\u2016" in printed(stream)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_json_for_programs_stays_json_in_any_encoding(
    encoding: str,
    llama: Path,
    words_file: Path,
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = tmp_path / f"二²\U0001f600{NOT_UTF8}.txt"
    text.write_bytes(words_file.read_bytes())
    stream = stdout_in(encoding, monkeypatch)
    assert run_main(evaluate.main, llama, "--data", text, "--seqlen", 24, "--json") == 0
    assert json.loads(printed(stream))["protocol"].startswith(f"{text.name} as it is")


def test_help_is_printed_in_the_locale_of_old_machines() -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    done = call("quantize", "--help", env=locale)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "PT\\u00b2-LLM" in done.stdout.decode("ascii")


@pytest.mark.parametrize(("how", "closed"), [("pipe", "both"), ("full", "stdout"), ("closed", "both")])
def test_a_run_that_nobody_reads_is_finished(
    how: str, closed: str, llama: Path, words_file: Path, tmp_path: Path
) -> None:
    """As after `| head`, on a full disk, and with >&-."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "harness.quantize", *quantize_arguments(llama, words_file, out)]
    redirect = {"pipe": "", "full": ">/dev/full", "closed": ">&-"}[how]
    if closed == "both":
        redirect += {"pipe": "2>&1", "full": " 2>&1", "closed": " 2>&-"}[how]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", *map(str, command)],
        stdout=writer if how == "pipe" else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0
    assert_complete(out)


def test_a_program_that_only_prints_ends_quietly_without_a_reader(llama: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = call("generate", llama, "--prompt", "w3 w4", "--tokens", "5", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("place", range(5))
def test_names_that_are_not_utf8_are_refused_at_once(
    place: int, llama: Path, words_file: Path, tmp_path: Path, run_main: Run, capsys: Capture
) -> None:
    """The libraries that write tokenizers do not take them, and say so at the end of a run."""
    odd = tmp_path / NOT_UTF8
    main, arguments = (
        (quantize_main, quantize_arguments(llama, words_file, odd)),
        (quantize_main, quantize_arguments(odd, words_file, tmp_path / "out")),
        (evaluate.main, [odd, "--data", words_file]),
        (inspect_main, [odd]),
        (export_main, [llama, "--format", "gguf", "--out", odd]),
    )[place]
    assert run_main(main, *arguments) == EXIT_USAGE
    last = capsys.readouterr().err.splitlines()[-1]
    assert "caf\\udce9' is not a name in UTF-8, as" in last
    assert "rename it, or set a locale with UTF-8" in last
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, all names are Unicode")
def test_text_and_the_folder_around_may_have_any_name(
    llama: Path, words_file: Path, tmp_path: Path, run_main: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / NOT_UTF8
    here.mkdir()
    monkeypatch.chdir(here)
    text = Path(f"{NOT_UTF8}.txt")
    text.write_bytes(words_file.read_bytes())
    for more in ((), ("--force",)):
        assert run_main(quantize_main, *quantize_arguments(llama, text, Path("out")), *more) == 0
    assert read_json(here / "out" / REPORT)["options"]["calibration"] == str(text)
    assert run_main(evaluate.main, "out", "--data", text, "--seqlen", 24) == 0


def test_json_files_hold_any_string(tmp_path: Path) -> None:
    value = {"name": f'{NOT_UTF8} \ud800 \\ " ‖ \U0001f600'}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "‖ \U0001f600" in json_text(value)
