"""What both exports share: what is printed, what is refused, and that no half output is left."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import harness
from harness import evaluate
from harness.cli import EXIT_INTERRUPTED, EXIT_USAGE
from harness.errors import UserError
from harness.export.__main__ import main as export_main
from harness.export.gguf import export_gguf
from harness.export.gguf_types import pack
from harness.export.hqq import export_hqq
from harness.quantize.__main__ import main as quantize_main
from reference.types import TernaryMatrix
from tests.harness.conftest import SMALL
from tests.harness.export.checkpoints import Run, byte_level, config_of, raw, raw_grid, write


@pytest.mark.parametrize("format_", ["gguf", "hqq"])
def test_what_was_rounded_is_what_is_printed(format_: str, plain: Path, tmp_path: Path) -> None:
    write_it = export_gguf if format_ == "gguf" else export_hqq
    exported = write_it(plain, tmp_path / "out")
    shares = []
    for name in raw(plain)[1]:
        _, alpha, mu = (grid[:, ::64] for grid in raw_grid(plain, name))
        alpha, mu = alpha[alpha != 0], mu[alpha != 0]
        if format_ == "gguf":
            shares.append(((mu - alpha).half().double() - (mu - alpha)).abs() / alpha.abs())
        else:
            shares.append(((1 - mu / alpha).half().double() - (1 - mu / alpha)).abs())
    expected = torch.cat(shares)
    assert exported.rounding.blocks == len(expected)
    assert exported.rounding.largest == pytest.approx(float(expected.max()))
    assert exported.rounding.mean == pytest.approx(float(expected.mean()))
    # Nearly a whole half unit somewhere among thousands of blocks, and nowhere more.
    assert 0.95 < exported.rounding.used <= 1
    assert exported.weights == 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 160)
    summary = exported.summary("it")
    assert f"by at most {exported.rounding.largest:.2g} alpha" in summary
    # HQQ's groups are of 64 weights in rows of 128, of 32 in rows of 160; each has 32 bits of its own.
    narrow, wide = exported.weights - 2 * 128 * 160, 2 * 128 * 160
    bits = 5 * exported.weights if format_ == "gguf" else narrow * (2 + 32 / 64) + wide * (2 + 32 / 32)
    assert 8 * exported.weight_bytes == bits


@pytest.mark.parametrize("format_", ["gguf", "hqq"])
def test_without_shifts_the_export_is_that_of_shifts_of_0(format_: str, tmp_path: Path) -> None:
    write_it = export_gguf if format_ == "gguf" else export_hqq
    made = []
    for name, symmetric in (("zeros", False), ("none", True)):
        folder, out = tmp_path / name / "checkpoint", tmp_path / f"{name}.out"
        write(folder, config_of("tied"), change=lambda scale, shift: shift.fill(0), symmetric=symmetric)
        write_it(folder, out)
        made.append([file.read_bytes() for file in ([out] if out.is_file() else out.glob("*.safetensors"))])
    assert made[0] == made[1]


@pytest.mark.parametrize("format_", ["gguf", "hqq"])
def test_a_model_from_start_to_end(
    format_: str, run_main: Run, words_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ternarized without reordering, exported by the command line, and measured by it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of("untied"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "original")
    byte_level().save_pretrained(tmp_path / "original")
    folder, out = tmp_path / "checkpoint", tmp_path / "model.gguf"
    arguments = ("--calibration", words_file, "--eval", "none", "--reorder", "none", "--block-size", 64)
    assert run_main(quantize_main, tmp_path / "original", "--out", folder, *arguments, *SMALL) == 0
    capsys.readouterr()
    assert run_main(export_main, folder, "--format", format_, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "bits per ternary weight" in printed
    assert "alpha on average over" in printed
    if format_ == "gguf":
        values = []
        for source in (folder, out):
            assert run_main(evaluate.main, source, "--data", words_file, "--seqlen", 24, "--json") == 0
            values.append(json.loads(capsys.readouterr().out)["value"])
        assert values[1] == pytest.approx(values[0], rel=0.01)


def damage_trits(folder: Path) -> None:
    file = next(folder.glob("model*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.trits"][3, 4] = 250
    save_file(tensors, file, metadata={"format": "pt"})


def drop_norm(folder: Path) -> None:
    file = next(folder.glob("model*.safetensors"))
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("format_", ["gguf", "hqq"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_trits, "model.layers.1.mlp.up_proj.trits is damaged: byte 250 is not the code of 5 trits"),
        (drop_norm, "lacks model.norm.weight"),
        (lambda folder: (folder / "config.json").write_text("{}"), "is not a ternary checkpoint"),
    ],
)
def test_damage_is_refused_as_it_is_by_load(
    format_: str,
    damage: Callable[[Path], None],
    message: str,
    run_main: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = write(tmp_path / "checkpoint", config_of("tied")), tmp_path / "out"
    damage(folder)
    assert run_main(export_main, folder, "--format", format_, "--out", out) == EXIT_USAGE
    error = capsys.readouterr().err
    assert message in error
    with pytest.raises(UserError) as refused:
        harness.load(folder)
    assert error == f"error: {refused.value}\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("format_", ["gguf", "mlx", "hqq"])
def test_a_reordered_checkpoint_is_refused(
    format_: str, quantized: Path, run_main: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(export_main, quantized, "--format", format_, "--out", tmp_path / "out") == EXIT_USAGE
    error = capsys.readouterr().err
    assert "were reordered" in error
    assert "groups of neighbouring columns" in error
    assert "--reorder none" in error
    assert not (tmp_path / "out").exists()


def test_grids_of_8_bits_are_refused(
    run_main: Run, llama: Path, words_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    arguments = ("--calibration", words_file, "--eval", "none", "--reorder", "none", "--grid", "int8")
    assert run_main(quantize_main, llama, "--out", folder, *arguments, *SMALL) == 0
    capsys.readouterr()
    assert run_main(export_main, folder, "--format", "hqq", "--out", tmp_path / "out") == EXIT_USAGE
    assert "would round alpha as well; quantize with --grid float16" in capsys.readouterr().err


@pytest.mark.parametrize("format_", ["gguf", "hqq"])
def test_an_existing_output_is_kept_unless_forced(
    format_: str, plain: Path, run_main: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = (plain, "--format", format_, "--out", out)
    assert run_main(export_main, *arguments) == 0
    file = out if format_ == "gguf" else out / "qmodel.safetensors"
    before = file.read_bytes()
    file.write_bytes(b"mine")
    assert run_main(export_main, *arguments) == EXIT_USAGE
    assert "--force to overwrite" in capsys.readouterr().err
    assert file.read_bytes() == b"mine"
    assert run_main(export_main, *arguments, "--force") == 0
    assert file.read_bytes() == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("format_", "inside", "message"),
    [
        ("hqq", "", "is inside the checkpoint"),
        ("hqq", "new/folder", "is inside the checkpoint"),
        ("gguf", "", "is a folder"),
        ("gguf", "model.safetensors.index.json", "is inside the checkpoint"),
        ("gguf", "new.gguf", "is inside the checkpoint"),
    ],
)
def test_the_checkpoint_that_is_read_is_never_written_over(
    format_: str,
    inside: str,
    message: str,
    plain: Path,
    run_main: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    link = tmp_path / "link"
    link.symlink_to(plain)
    before = contents(plain)
    for folder, out in ((plain, plain / inside), (plain, link / inside), (link, plain / inside)):
        assert run_main(export_main, folder, "--format", format_, "--out", out, "--force") == EXIT_USAGE
        assert message in capsys.readouterr().err
    assert contents(plain) == before


def test_an_interrupted_export_leaves_what_was_there(
    plain: Path, run_main: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.gguf"
    out.write_bytes(b"older")
    done = []

    def interrupt(matrix: TernaryMatrix, kind: str, name: str, rounding: Any) -> np.ndarray:
        done.append(name)
        if len(done) == 3:
            raise KeyboardInterrupt
        return pack(matrix, kind, name, rounding)

    monkeypatch.setattr("harness.export.gguf.pack", interrupt)
    arguments = ("--format", "gguf", "--out", out, "--force")
    assert run_main(export_main, plain, *arguments) == EXIT_INTERRUPTED
    assert out.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [out]


def test_the_folder_of_a_gguf_file_is_made(
    plain: Path,
    run_main: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("harness.export.gguf.read_exportable", lambda *arguments: pytest.fail("read"))
    out = tmp_path / "file" / "a.gguf"
    assert run_main(export_main, plain, "--format", "gguf", "--out", out) == EXIT_USAGE
    assert f"{tmp_path / 'file'} exists and is not a folder" in capsys.readouterr().err
    monkeypatch.undo()
    for out in (tmp_path / "one" / "two" / "a.gguf", Path("here.gguf")):
        monkeypatch.chdir(tmp_path)
        assert run_main(export_main, plain, "--format", "gguf", "--out", out) == 0
        assert (tmp_path / out).read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("format_", ["gguf", "hqq"])
def test_a_full_disk_leaves_nothing_behind(
    format_: str,
    existing: bool,
    plain: Path,
    run_main: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / ("folder/out" if format_ == "gguf" else "out")
    if existing:
        assert run_main(export_main, plain, "--format", format_, "--out", out) == 0
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    monkeypatch.setattr("harness.export.folder.save_file", full)
    arguments = (plain, "--format", format_, "--out", out, "--force")
    assert run_main(export_main, *arguments) == EXIT_USAGE
    assert "out could not be written: " in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
