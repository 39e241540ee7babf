"""An interrupted run is not continued with another model, other text or other settings."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cli import EXIT_USAGE
from harness.models.folder import PROGRESS, REPORT, STAGING
from harness.models.identity import identify
from harness.quantize.__main__ import main as quantize_main
from harness.ternary.writing import CheckpointWriter
from tests.harness import tiny
from tests.harness.quantize.stopping import files_of, stopped_after

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        (("--seed", "1"), "config.seed was 0 and is 1"),
        (("--nsamples", "7"), "calibration.nsamples was 8 and is 7"),
        (("--embedding", "int8"), "options.embedding was as-it-is and is int8"),
        (("--true-sequential",), "calibration.true_sequential was False and is True"),
    ],
)
def test_another_run_is_not_gone_on_with(
    switches: tuple[str, ...],
    message: str,
    command: list[object],
    tmp_path: Path,
    run_main: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopped_after(1, run_main, *command)
    capsys.readouterr()
    assert run_main(quantize_main, *command, *switches, "--resume") == EXIT_USAGE
    printed = capsys.readouterr()
    assert message in printed.err
    assert "repeat the command of that run with --resume, or start over with --force" in printed.err
    assert "layers are kept" not in printed.out
    assert run_main(quantize_main, *command, "--resume") == 0


@pytest.mark.parametrize(
    "change", [lambda words: words[::-1], lambda words: [words[1], words[0], *words[2:]]]
)
def test_other_text_is_found_by_the_tokens_of_the_windows(
    change: Callable[[list[str]], list[str]],
    command: list[object],
    words_file: Path,
    tmp_path: Path,
    run_main: Run,
    capsys: Capture,
) -> None:
    """Also where two words have only changed places, so that a sum over all inputs stays the same."""
    text = tmp_path / "text.txt"
    text.write_text(words_file.read_text())
    command[command.index(words_file)] = text
    more = ("--nsamples", "64")  # so that a window begins at every place
    stopped_after(1, run_main, *command, *more)
    text.write_text(" ".join(change(words_file.read_text().split())))
    assert run_main(quantize_main, *command, *more, "--resume") == EXIT_USAGE
    assert "calibration.windows_checksum was " in capsys.readouterr().err


def change_weight(name: str) -> Callable[[Path], None]:
    """Change one weight of a model's file, and neither its size nor its time."""

    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors, times = load_file(file), file.stat()
        tensors[name].view(-1)[-1] += 0.5
        save_file(tensors, file, metadata={"format": "pt"})
        assert file.stat().st_size == times.st_size
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    return change


def change_json(file: str, **entries: object) -> Callable[[Path], None]:
    """Set entries of a JSON file."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **entries}))

    return change


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("file", "change"),
    [
        *(
            ("model.safetensors", change_weight(name))
            for name in (
                "model.embed_tokens.weight",  # of a token that is not in the text
                "model.layers.0.input_layernorm.weight",
                "model.layers.0.mlp.up_proj.weight",  # of a layer that is finished
                "model.layers.2.mlp.up_proj.weight",
                "model.norm.weight",
                "lm_head.weight",
            )
        ),
        (
            "config.json",
            change_json("config.json", rope_parameters={"rope_type": "default", "rope_theta": 9.0}),
        ),
        ("generation_config.json", change_json("generation_config.json", max_length=7)),
        ("tokenizer_config.json", change_json("tokenizer_config.json", model_max_length=7)),
        ("chat_template.jinja", lambda folder: (folder / "chat_template.jinja").write_text("{{ 1 }}")),
        ("generation_config.json", lambda folder: (folder / "generation_config.json").unlink()),
    ],
)
def test_a_run_of_another_original_is_not_gone_on_with(
    file: str,
    change: Callable[[Path], object],
    streamed: bool,
    command: list[object],
    model: Path,
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """Whatever has changed; README promises the bytes of an uninterrupted run."""
    if streamed:
        monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    folder = command[0] = shutil.copytree(model, tmp_path / "model")
    stopped_after(1, run_main, *command)
    kept = files_of(tmp_path / "out" / STAGING)
    change(folder)
    capsys.readouterr()
    assert run_main(quantize_main, *command, "--resume") == EXIT_USAGE
    printed = capsys.readouterr()
    assert f"holds a run of another original: {file} of {folder} is not what that run read" in printed.err
    assert "start over with --force" in printed.err
    assert files_of(tmp_path / "out" / STAGING) == kept


def test_a_model_that_changes_under_a_run_is_not_mixed(
    command: list[object],
    model: Path,
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """Its layers are read one after the other, hours apart if they are large."""
    monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    folder = command[0] = shutil.copytree(model, tmp_path / "model")
    note = CheckpointWriter.note

    def changed(self: CheckpointWriter, report: dict[str, object]) -> None:
        note(self, report)
        shutil.copyfile(model / "model.safetensors", folder / "model.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "note", changed)
        assert run_main(quantize_main, *command) == EXIT_USAGE
    printed = capsys.readouterr()
    assert f"{folder / 'model.safetensors'} has changed while the model was in use" in printed.err
    assert "1 of 3 layers are kept" in printed.out
    assert run_main(quantize_main, *command, "--resume") == 0  # what was copied is the same in the end


def test_a_moved_original_is_the_same(
    command: list[object], model: Path, tmp_path: Path, run_main: Run, capsys: Capture
) -> None:
    """Copied as people copy, with new times, and beside files that no run reads."""
    stopped_after(1, run_main, *command)
    command[0] = tmp_path / "moved"
    command[0].mkdir()
    for file in model.iterdir():
        shutil.copyfile(file, command[0] / file.name)
    (command[0] / "README.md").write_text("moved")
    (command[0] / "consolidated.safetensors").write_bytes(b"the same weights by other names")
    assert run_main(quantize_main, *command, "--resume") == 0
    moved = files_of(tmp_path / "out")
    command[0] = model
    assert run_main(quantize_main, *command, "--force") == 0
    assert files_of(tmp_path / "out") == moved


def test_shards_and_torch_files_are_identified_as_transformers_reads_them(tmp_path: Path) -> None:
    def checksums() -> set[str]:
        return set(identify(str(tmp_path), lambda line: None))

    network = tiny.make_model("qwen3", ternary=False)
    network.config.save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    assert checksums() == {"config.json", "pytorch_model.bin"}
    network.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = {file.name for file in tmp_path.glob("model-*.safetensors")}
    assert len(shards) > 2
    assert checksums() == {"config.json", "generation_config.json", "model.safetensors.index.json", *shards}


def test_a_gguf_file_is_identified_with_all_its_parts(tmp_path: Path) -> None:
    for name in ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "b-00001-of-00002.gguf", "a.gguf"):
        (tmp_path / name).write_text(name)
    split = ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]
    for name, parts in (("a.gguf", ["a.gguf"]), (split[0], split)):
        expected = {part: hashlib.sha256(part.encode()).hexdigest() for part in parts}
        assert identify(str(tmp_path / name), lambda line: None) == expected


def test_a_model_id_is_identified_by_its_commit(
    command: list[object],
    model: Path,
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """Not by its name, which means whatever its newest commit is."""
    cache = tmp_path / "hub" / "models--some--model"
    (cache / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(model, cache / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    command[0] = "some/model"
    for commit, code in (("a" * 40, 0), ("b" * 40, EXIT_USAGE), ("a" * 40, 0)):
        (cache / "refs" / "main").write_text(commit)
        if not (tmp_path / "out").exists():
            stopped_after(1, run_main, *command)
        else:
            assert run_main(quantize_main, *command, "--resume") == code
    assert (
        "commit of some/model is not what that run read (aaaaaaaaaaaa then, bbbb" in capsys.readouterr().err
    )


def test_a_run_of_a_version_that_noted_no_original_is_not_gone_on_with(
    command: list[object], tmp_path: Path, run_main: Run, capsys: Capture
) -> None:
    stopped_after(1, run_main, *command)
    change_json(PROGRESS, original=None)(tmp_path / "out" / STAGING)
    assert run_main(quantize_main, *command, "--resume") == EXIT_USAGE
    assert "did not note what the original was; start over with --force" in capsys.readouterr().err


def test_other_text_of_an_evaluation_is_measured_anew(
    command: list[object], words_file: Path, tmp_path: Path, run_main: Run
) -> None:
    text = tmp_path / "eval.txt"
    text.write_text(words_file.read_text())
    command += ["--eval", text, "--eval-seqlen", 24]
    stopped_after(1, run_main, *command)
    text.write_text(tiny.words(400, seed=1))
    assert run_main(quantize_main, *command, "--resume") == 0
    resumed = json.loads((tmp_path / "out" / REPORT).read_text())["perplexity"]
    assert run_main(quantize_main, *command, "--force") == 0
    assert json.loads((tmp_path / "out" / REPORT).read_text())["perplexity"] == resumed
