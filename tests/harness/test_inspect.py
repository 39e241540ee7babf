"""What harness.inspect and harness.generate say of a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import harness
from harness import inspect
from harness.cli import EXIT_USAGE
from harness.generate import __main__ as generate
from harness.models.folder import GENERATION
from harness.models.original import Original
from harness.ternary.format import packed_bytes
from harness.ternary.reading import tensors_of
from reference.packing import unpack_base3
from tests.harness import tiny
from tests.harness.export.checkpoints import code_cache, with_own_code

Run = Callable[..., int]


def test_every_byte_is_counted(quantized: Path, run_main: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(inspect.main, quantized, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    files = list(quantized.glob("*.safetensors"))
    assert found["bytes_on_disk"] == sum(file.stat().st_size for file in files)
    # A safetensors file is eight bytes of length, a header, and the tensors.
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert sum(found["bytes"].values()) == found["bytes_on_disk"] - headers
    tensors = dict(tensors_of(quantized))
    for layer in found["layers"]:
        trits = unpack_base3(tensors[f"{layer['name']}.trits"].numpy(), layer["columns"])
        assert layer["counts"] == [int((trits == t).sum()) for t in (-1, 0, 1)]
        packed = packed_bytes(layer["rows"], layer["columns"], found["block_size"], "float16", True)
        assert layer["bytes"] == packed
    assert sum(layer["bytes"] for layer in found["layers"]) == sum(
        size for kind, size in found["bytes"].items() if kind != "rest"
    )


def test_the_table_has_a_line_for_every_layer(
    quantized: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(inspect.main, quantized) == 0
    out = capsys.readouterr().out
    assert out.count("_proj ") == 21
    assert "128 x 176" in out
    assert "21 ternary layers" in out


def test_code_that_comes_with_a_model_runs_only_if_it_is_trusted(
    plain: Path, run_main: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_own_code(plain, tmp_path / "own")
    assert run_main(inspect.main, folder) == EXIT_USAGE
    assert "trust_remote_code" in capsys.readouterr().err
    with code_cache(tmp_path / "modules"):
        assert run_main(inspect.main, folder, "--trust-remote-code") == 0
    found = capsys.readouterr().out
    assert run_main(inspect.main, plain) == 0
    assert found == capsys.readouterr().out


@pytest.mark.parametrize("program", [inspect, generate])
def test_what_is_no_checkpoint_is_refused(
    program: object, tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ("--prompt", "w3") if program is generate else ()
    assert run_main(program.main, tmp_path / "none", *extra) == EXIT_USAGE  # type: ignore[attr-defined]
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--dense",)])
def test_a_prompt_is_continued_with_the_likeliest_tokens(
    options: tuple[str, ...], quantized: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--prompt", "w5 w6 w7", "--tokens", "6", "--cpu", *options)
    assert run_main(generate.main, quantized, *arguments) == 0
    captured = capsys.readouterr()
    model, ids = harness.load(quantized), [5, 6, 7]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(np.argmax(model(torch.tensor([ids])).logits[0, -1].float().numpy())))
    words = [f"w{i}" for i in ids[3:] if i > 2]
    assert captured.out.split()[: len(words)] == words
    assert "prompt of 3 tokens" in captured.err
    assert "tokens/s" in captured.err


def test_transformers_does_not_warn_of_what_nobody_asked_for(quantized: Path, tmp_path: Path) -> None:
    """Most models come with settings for sampling, which greedy decoding ignores."""
    folder = shutil.copytree(quantized, tmp_path / "sampling")
    settings = json.loads((folder / GENERATION).read_text())
    (folder / GENERATION).write_text(json.dumps({**settings, "temperature": 0.6, "top_p": 0.9}))
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    command = [sys.executable, "-m", "harness.generate", folder, "--prompt", "w3", "--tokens", "2", "--cpu"]
    run = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stderr.startswith("prompt of 1 token ")


def test_without_a_path_the_embedded_model_writes(
    run_main: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def embedded(source: str | None, *device: object, **options: object) -> Original:
        assert source is None
        return Original(tiny.make_model("llama"), tiny.make_tokenizer(), "embedded")

    monkeypatch.setattr(generate, "open_model", embedded)
    assert run_main(generate.main, "--prompt", "w5 w6", "--tokens", "3", "--cpu") == 0
    assert "prompt of 2 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "w3 \udcff"), "the prompt is not valid Unicode: character 3 is U+DCFF"),
        (
            ("--prompt", "w3 w4", "--tokens", "2047"),
            "the prompt (2 tokens) and --tokens 2047 make 2049 tokens, more than the 2048 positions of",
        ),
        (("--prompt", "w3", "--chat"), "has no chat template; drop --chat"),
        (("--prompt", "w3", "--temperature", "-1"), "must be 0, or finite and at least 1e-06"),
        (("--prompt", "w3", "--temperature", "1e-320"), "must be 0, or finite and at least 1e-06"),
        (("--prompt", "w3", "--tokens", f"{10**30}"), "must be at most 2147483647"),
        (("--prompt", "w3", "--seed", str(2**64)), "--seed must be a 64-bit integer"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(
    arguments: tuple[str, ...],
    message: str,
    quantized: Path,
    run_main: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(generate.main, quantized, *arguments) == EXIT_USAGE
    assert message in capsys.readouterr().err
