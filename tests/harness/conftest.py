"""A small model, text, and a way to call command lines."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from harness import cli
from harness.page import figures
from harness.quantize.__main__ import main as quantize_main
from tests.harness import tiny
from tests.harness.export import checkpoints

# Matrices this small are done before a second thread has woken up.
torch.set_num_threads(1)

# Enough tokens for every width of the tiny models, and little enough to be quick.
SMALL = (
    *("--recipe", "paper", "--backend", "reference"),
    *("--nsamples", "8", "--seqlen", "24"),
)


PLOTS = figures.plots


@pytest.fixture(scope="session", autouse=True)
def _without_plots() -> Iterator[None]:
    """Let runs draw their pages without plots, which would take two seconds of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "plots", lambda record: {})
        yield


@pytest.fixture
def with_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw pages as they are drawn outside tests."""
    monkeypatch.setattr(figures, "plots", PLOTS)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA on a ternary grid, as a folder."""
    return tiny.save(tiny.make_model("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def words_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of 400 tokens."""
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(tiny.words(400))
    return file


@pytest.fixture(scope="session")
def quantized(llama: Path, words_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small LLaMA ternarized in blocks of 64. Not to be changed."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    arguments = [
        llama,
        "--out",
        out,
        "--calibration",
        words_file,
        "--eval",
        words_file,
        "--eval-seqlen",
        24,
        "--block-size",
        tiny.BLOCK,
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["quantize", *map(str, arguments), *SMALL])
        assert quantize_main() == 0
    return out


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tied LLaMA of random trits that were not reordered, in float32. Not to be changed."""
    return checkpoints.write(tmp_path_factory.mktemp("plain") / "checkpoint", checkpoints.config_of("tied"))


@pytest.fixture
def damaged(quantized: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return shutil.copytree(quantized, tmp_path / "damaged")


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a command line as a shell would, and give its exit code."""

    def call(main: Callable[[], int], *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.run(main)
        return int(exit_.value.code or 0)

    return call
