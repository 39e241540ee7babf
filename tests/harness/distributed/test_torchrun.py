"""torchrun itself starts the processes; their bytes and figures are those of one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import distributed

from harness.evaluate import main as evaluate_main
from harness.files import read_json
from harness.models.folder import REPORT
from harness.quantize.__main__ import main as quantize_main
from tests.harness import tiny
from tests.harness.conftest import SMALL
from tests.harness.quantize.stopping import files_of

Run = Callable[..., int]

QUANTIZE = ("model", "--out", "out", "--calibration", "words.txt", *SMALL, "--eval", "none")
QUANTIZE = (*QUANTIZE, "--recipe", "best", "--backend", "cpu")
EVALUATE = ("out", "--original", "model", "--data", "words.txt", "--seqlen", "24", "--cpu", "--json")

# Far more than they take; a process that waits for another one would wait longer.
LIMIT = 280


@pytest.fixture(scope="module")
def machine(words_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a text."""
    folder = tmp_path_factory.mktemp("machines") / "alone"
    tiny.save(tiny.make_model("qwen3", ternary=False), folder / "model")
    shutil.copy(words_file, folder / "words.txt")
    return folder


def torchrun(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in this process
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_machines_without_a_shared_folder_and_two_processes_give_what_one_process_does(
    machine: Path, run_main: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The machines its checkpoint, and processes on one of them its figures."""
    folders = [shutil.copytree(machine, machine.parent / name) for name in ("first", "second")]
    # Kept here, the store of the rendezvous has a port that no other program can have.
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{store.port}")
    meeting += ("--rdzv-id", "test", "--rdzv-conf", "is_host=false", "--local-addr", "127.0.0.1")
    nodes = ("--nnodes", 2, "--nproc-per-node", 1, *meeting, "-m", "harness.quantize")
    launchers = [torchrun(folder, *nodes, *QUANTIZE) for folder in folders]
    monkeypatch.chdir(machine)
    try:
        assert run_main(quantize_main, *QUANTIZE) == 0
        ends = [launcher.communicate(timeout=LIMIT) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()  # it ends its processes
    assert [launcher.returncode for launcher in launchers] == [0, 0], ends
    # The machine that comes first has rank 0, whichever it is.
    wrote = [folder for folder in folders if (folder / "out").exists()]
    assert len(wrote) == 1
    assert files_of(wrote[0] / "out") == files_of(machine / "out")
    assert read_json(wrote[0] / "out" / REPORT)["processes"] == 2
    assert ends[1 - folders.index(wrote[0])][0] == ""

    capsys.readouterr()
    assert run_main(evaluate_main, *EVALUATE) == 0
    alone = json.loads(capsys.readouterr().out)
    both = torchrun(machine, "--standalone", "--nproc-per-node", 2, "-m", "harness.evaluate", *EVALUATE)
    try:
        out, error = both.communicate(timeout=LIMIT)
    finally:
        both.terminate()
    assert both.returncode == 0, error
    assert json.loads(out) == alone
