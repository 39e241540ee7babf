"""What python -m harness.quantize refuses, and what is left of a run that does not reach its end."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import harness
from harness.backends import Backend
from harness.cli import EXIT_INTERRUPTED, EXIT_USAGE
from harness.errors import UserError
from harness.files import write_json
from harness.models.folder import PROCESSOR, REPORT
from harness.models.tokenizer import load_tokenizer
from harness.quantize.__main__ import main as quantize_main
from tests.harness import tiny
from tests.harness.conftest import SMALL

Run = Callable[..., int]


def test_an_alignment_that_the_backend_leaves_out_is_refused_at_once(
    tmp_path: Path, run_main: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = ModuleType("lacking")
    package.REFUSED = frozenset({"aga.align_grid_printed"})  # type: ignore[attr-defined]
    monkeypatch.setattr("harness.quantize.prepare.load_backend", lambda *names: Backend("lacking", package))
    assert run_main(quantize_main, "--out", tmp_path / "out", "--aga", "printed") == EXIT_USAGE
    assert "lacking does not have Eq. 13 as printed; use --backend reference" in capsys.readouterr().err


def test_a_device_that_is_too_small_ends_the_run_with_what_to_do(
    llama: Path,
    words_file: Path,
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr("harness.calibration.passage.Passage.collect", full)
    arguments = ("--out", tmp_path / "out", "--calibration", words_file, *SMALL)
    assert run_main(quantize_main, llama, *arguments) == EXIT_USAGE
    assert "out of GPU memory (CUDA out of memory); free some" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_machine_that_is_too_small_ends_the_run_with_what_to_do(
    llama: Path,
    words_file: Path,
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("harness.quantize.run.host_memory", lambda: 1_000_000)
    monkeypatch.setattr(
        "harness.calibration.passage.Passage.collect", lambda *arguments: torch.empty(1 << 60)
    )
    arguments = ("--out", tmp_path / "out", "--calibration", words_file, *SMALL)
    assert run_main(quantize_main, llama, *arguments) == EXIT_USAGE
    printed = capsys.readouterr()
    assert "warning: this machine has 0.0 GB of memory, the run needs about 0." in printed.out
    assert "this machine is out of memory; free some" in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--out", "OUT"), "exists and is not empty; choose another --out, or pass --force to overwrite it"),
        (("--out", "LINK"), "LINK exists and is not a folder"),
        ((), "--out DIR is missing"),
        (("--out", "NEW", "--seqlen", "400"), "has 400 tokens, but windows of 400 need at least 401"),
        (("--out", "NEW", "--damping", "-1"), "damping must be finite and not negative"),
        (("--out", "NEW", "--calibration", "no.txt"), "no.txt is not a file"),
        (("--out", "NEW", "--calibration", ""), "the name of the text is empty; is a shell variable unset?"),
        (("--out", "NEW", "--eval", "c4:"), "c4: has no file name after the colon"),
        (
            ("--out", "NEW", "--text-column", "words"),
            "--text-column words applies only to .jsonl, .csv, .parquet",
        ),
        (("--out", "NEW", "--seed", "-1"), "seed must not be negative"),
        (("--out", "NEW", "--eval", "TEXT", "--eval-seqlen", "401"), "less than one window of 401"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    extra: tuple[str, ...],
    message: str,
    llama: Path,
    words_file: Path,
    tmp_path: Path,
    run_main: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "OUT").mkdir()
    (tmp_path / "LINK").symlink_to(tmp_path / "gone")
    (tmp_path / "OUT" / "mine.txt").write_text("mine")
    (tmp_path / "TEXT").write_text(tiny.words(400))
    arguments = [str(tmp_path / a) if a in ("OUT", "LINK", "NEW", "TEXT") else a for a in extra]
    code = run_main(quantize_main, llama, *SMALL, "--calibration", words_file, *arguments)
    assert code == EXIT_USAGE
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert (tmp_path / "OUT" / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "NEW").exists()


def test_force_replaces_an_earlier_checkpoint_and_leaves_other_files(
    damaged: Path, llama: Path, words_file: Path, run_main: Run
) -> None:
    (damaged / "mine.txt").write_text("mine")
    (damaged / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    (damaged / "model_backup.safetensors").write_bytes(b"mine")
    arguments = (llama, "--out", damaged, "--force", "--calibration", words_file, *SMALL)
    assert run_main(quantize_main, *arguments) == 0
    assert (damaged / "mine.txt").read_text() == "mine"
    assert (damaged / "model_backup.safetensors").read_bytes() == b"mine"
    assert not (damaged / "model-00009-of-00009.safetensors").exists()
    assert json.loads((damaged / REPORT).read_text())["config"]["block_size"] == 128
    harness.load(damaged)


def test_an_interrupted_run_leaves_nothing_that_loads(
    llama: Path,
    words_file: Path,
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.quantize.sink._outside_layers", interrupt)
    arguments = (llama, "--out", tmp_path / "out", "--calibration", words_file, *SMALL)
    assert run_main(quantize_main, *arguments) == EXIT_INTERRUPTED
    with pytest.raises(UserError, match=r"no config\.json"):
        harness.load(tmp_path / "out")
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith("3 of 3 layers are kept: add --resume")
    assert printed.err.strip().endswith("interrupted")


def test_a_run_interrupted_while_files_move_leaves_nothing_that_loads(
    damaged: Path, llama: Path, words_file: Path, run_main: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = os.replace

    def interrupt(source: Path, target: Path) -> None:
        if Path(target) == damaged / "model-00002-of-00004.safetensors":
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(os, "replace", interrupt)
    arguments = (llama, "--out", damaged, "--force", "--calibration", words_file, *SMALL)
    assert run_main(quantize_main, *arguments) == EXIT_INTERRUPTED
    with pytest.raises(UserError, match=r"no config\.json"):
        harness.load(damaged)


def test_the_original_is_not_written_over(
    llama: Path, words_file: Path, tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(llama, tmp_path / "source")
    arguments = (source, "--out", source / ".." / "source", "--force", "--calibration", words_file, *SMALL)
    assert run_main(quantize_main, *arguments) == EXIT_USAGE
    assert "holds the original model; choose another --out" in capsys.readouterr().err
    assert (source / "model.safetensors").is_file()


def test_a_baseline_does_not_put_its_report_over_that_of_a_checkpoint(
    damaged: Path, llama: Path, words_file: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (damaged / REPORT).read_bytes()
    arguments = (
        llama,
        "--method",
        "rtn-2bit",
        "--out",
        damaged,
        "--force",
        "--calibration",
        words_file,
        *SMALL,
    )
    assert run_main(quantize_main, *arguments) == EXIT_USAGE
    assert "holds a checkpoint, but a baseline writes none" in capsys.readouterr().err
    assert (damaged / REPORT).read_bytes() == before


def test_folders_of_the_tokenizer_are_replaced_too(
    damaged: Path, llama: Path, words_file: Path, tmp_path: Path, run_main: Run
) -> None:
    """Two chat templates make transformers write a folder beside the tokenizer."""
    source = shutil.copytree(llama, tmp_path / "source")
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.save_pretrained(source)
    for _ in range(2):
        arguments = (source, "--out", damaged, "--force", "--calibration", words_file, *SMALL)
        assert run_main(quantize_main, *arguments) == 0
    assert (damaged / "additional_chat_templates").is_dir()


def test_no_template_and_no_processor_is_left_over_of_an_earlier_checkpoint(
    damaged: Path, llama: Path, words_file: Path, run_main: Run
) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.save_pretrained(damaged)
    assert load_tokenizer(damaged).chat_template
    for name in PROCESSOR:
        (damaged / name).write_text("{}")
    arguments = (llama, "--out", damaged, "--force", "--calibration", words_file, *SMALL)
    assert run_main(quantize_main, *arguments) == 0
    assert load_tokenizer(damaged).chat_template is None
    assert not any((damaged / name).exists() for name in PROCESSOR)


def test_a_report_that_cannot_be_written_at_the_end_is_said_after_the_result(
    llama: Path,
    words_file: Path,
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(file: Path, value: object) -> None:
        if file == tmp_path / "out" / REPORT:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_json(file, value)

    monkeypatch.setattr("harness.quantize.run.write_json", full)
    arguments = (llama, "--out", tmp_path / "out", "--calibration", words_file, *SMALL)
    assert run_main(quantize_main, *arguments) == EXIT_USAGE
    printed = capsys.readouterr()
    assert "mean relative output error" in printed.out
    assert "No space left on device; the checkpoint is complete" in printed.err
    harness.load(tmp_path / "out")


def test_a_ternary_checkpoint_is_not_quantized_again(
    quantized: Path, words_file: Path, tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (quantized, "--out", tmp_path / "out", "--calibration", words_file, *SMALL)
    assert run_main(quantize_main, *arguments) == EXIT_USAGE
    assert "already quantized (pt2_llm); start from the original" in capsys.readouterr().err
