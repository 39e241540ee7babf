"""What a model lacks is said before its weights load: a tokenizer, or what Git LFS has not fetched."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from harness import evaluate
from harness.cli import EXIT_USAGE
from harness.errors import UserError
from harness.export.__main__ import main as export_main
from harness.generate import __main__ as generate
from harness.inspect import main as inspect_main
from harness.models.loading import load_original
from harness.models.tokenizer import load_tokenizer
from harness.quantize.__main__ import main as quantize_main
from tests.harness import tiny
from tests.harness.conftest import SMALL

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]

# As the specification of Git LFS has it.
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    f"oid sha256:{'4d7a2146' * 8}\n"
    "size 4976698672\n"
)  # fmt: skip


def no_weights(*arguments: object, **rest: object) -> None:
    raise AssertionError("the weights are loaded")


@pytest.fixture
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if weights are loaded."""
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_weights)


def programs(model: Path, words_file: Path, out: Path) -> list[tuple[Callable[[], int], list[object]]]:
    """Every program that reads a model with its tokenizer."""
    return [
        (quantize_main, [model, "--out", out, "--calibration", words_file, *SMALL]),
        (evaluate.main, [model, "--data", words_file, "--seqlen", "24"]),
        (generate.main, [model, "--prompt", "w3 w4"]),
    ]


@pytest.mark.parametrize("settings", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", sorted(tiny.CONFIGS))
def test_a_model_without_tokenizer_is_refused_in_a_line(
    kind: str,
    streamed: bool,
    settings: bool,
    words_file: Path,
    tmp_path: Path,
    run_main: Run,
    without_weights: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """Also where transformers makes one of special tokens alone, and where only the settings are there."""
    if streamed:
        monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    folder = tiny.save(tiny.make_model(kind), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    if not settings:
        (folder / "tokenizer_config.json").unlink()
    for main, arguments in programs(folder, words_file, tmp_path / "out"):
        assert run_main(main, *arguments) == EXIT_USAGE
        error = capsys.readouterr().err.strip()
        assert f"error: {folder} has no tokenizer; put tokenizer.json" in error
        assert "\n" not in error.partition("error: ")[2]
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_tokenizer_is_refused_in_a_line(
    damaged: Path, words_file: Path, run_main: Run, without_weights: None, capsys: Capture
) -> None:
    (damaged / "tokenizer.json").unlink()
    for main, arguments in programs(damaged, words_file, damaged)[1:]:
        assert run_main(main, *arguments) == EXIT_USAGE
        assert f"error: {damaged} has no tokenizer" in capsys.readouterr().err


def test_a_tokenizer_that_is_damaged_is_not_said_to_be_missing(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=f"the tokenizer of {folder} cannot be read"):
        load_original(str(folder))


def test_a_tokenizer_of_bytes_needs_no_files(tmp_path: Path) -> None:
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    tiny.make_model("llama").config.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("a").input_ids[0] == ord("a") + 3


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"]
)
def test_a_file_that_lfs_has_not_fetched_is_named(
    name: str, llama: Path, words_file: Path, tmp_path: Path, run_main: Run, capsys: Capture
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / name).write_text(POINTER)
    for main, arguments in programs(folder, words_file, tmp_path / "out"):
        assert run_main(main, *arguments) == EXIT_USAGE
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(
            f"error: {folder / name} is a Git LFS pointer, not the file itself; run git lfs pull"
        )


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_shard_that_lfs_has_not_fetched_is_named(kind: str, name: str, llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype="auto")
    model.save_pretrained(folder, max_shard_size="100KB")
    tiny.make_tokenizer().save_pretrained(folder)
    if kind == "bin":  # which transformers no longer writes

        def renamed(text: str) -> str:
            return re.sub(r"model([-0-9a-z]*)\.safetensors", r"pytorch_model\1.bin", text)

        for file in sorted(folder.glob("model*")):
            file.rename(folder / renamed(file.name))
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(renamed(index.read_text()))
        name = renamed(name)
    name = name.replace("-00003.", f"-{len(list(folder.glob('*model-*'))):05d}.")
    assert (folder / name).is_file()
    (folder / name).write_text(POINTER)
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer"):
        load_original(str(folder))


def test_pointers_that_no_one_reads_do_no_harm(llama: Path, tmp_path: Path) -> None:
    """As after `git lfs pull --include model.safetensors`."""
    folder = shutil.copytree(llama, tmp_path / "model")
    for name in (
        "consolidated.safetensors",
        "pytorch_model.bin",
        "model.onnx",
        "model-00001-of-00002.safetensors",
    ):
        (folder / name).write_text(POINTER)
    assert load_original(str(folder)).model.config.model_type == "llama"


def test_a_pointer_in_a_checkpoint_is_named(
    damaged: Path, words_file: Path, tmp_path: Path, run_main: Run, capsys: Capture
) -> None:
    shard = damaged / "model-00002-of-00004.safetensors"
    shard.write_text(POINTER)
    others = [
        (inspect_main, [damaged]),
        (export_main, [damaged, "--format", "hqq", "--out", tmp_path / "hqq"]),
    ]
    for main, arguments in [*programs(damaged, words_file, tmp_path / "out")[1:], *others]:
        assert run_main(main, *arguments) == EXIT_USAGE
        assert f"error: {shard} is a Git LFS pointer" in capsys.readouterr().err
