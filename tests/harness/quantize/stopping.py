"""Stop runs after a layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.cli import EXIT_INTERRUPTED
from harness.models.folder import PAGE, REPORT
from harness.quantize.__main__ import main as quantize_main
from harness.ternary.writing import CheckpointWriter

Run = Callable[..., int]


def stop_after(
    layers: int, patch: pytest.MonkeyPatch, error: type[BaseException] = KeyboardInterrupt
) -> None:
    """Stop the next run once it has noted so many layers."""
    note = CheckpointWriter.note

    def stop(self: CheckpointWriter, report: dict[str, object]) -> None:
        note(self, report)
        if len(report["layers"]) == layers:
            raise error

    patch.setattr(CheckpointWriter, "note", stop)


def stopped_after(layers: int, run_main: Run, *arguments: object) -> None:
    """Run the command until so many layers are noted, and stop it there."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(layers, patch)
        assert run_main(quantize_main, *arguments) == EXIT_INTERRUPTED


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but the report, which holds times."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in (REPORT, PAGE)}
