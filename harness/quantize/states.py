"""Keep the hidden states of the last finished layer on disk, so that a large run is resumed at once.

Without them, `harness.quantize.resume` runs the finished layers again. There is a file for each shard of
windows, whichever process writes it, so that another number of processes finds what it needs:

    DIR/OUT-1f0c9a3e/layer-00007/shard-00003.safetensors
        hidden, originals    (windows, 1, seqlen, width), as after layer 7, the first being layer 1

OUT is the name of the run's output folder, and the digits are of its whole path: runs that share DIR do not
touch each other's files.

Files are complete or absent. Those of a layer are deleted once the next layer is noted in progress.json, so
at any time one noted layer has its states. What is read back must have the checksum that was noted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from harness.calibration.passage import Passage, own_windows, sum_bits
from harness.errors import UserError

# Layers whose states are on disk at the same time, while those of one take the place of the other's.
LAYERS_KEPT = 2


class KeptStates:
    """Hidden states of this process's windows on disk.

    Parameters
    ----------
    folder : Path
        Where they are kept, in a folder of their own.
    out : Path
        The run's output folder, which no other run writes to at the same time.
    passage : Passage
        Hidden states of this process's windows.
    windows, seqlen : int
        Windows of all processes, and tokens of each.

    Raises
    ------
    UserError
        If layers leave more than hidden states for later layers, which is not kept.
    """

    def __init__(self, folder: Path, out: Path, passage: Passage, windows: int, seqlen: int) -> None:
        digest = hashlib.sha256(os.fsencode(out.resolve())).hexdigest()
        self.folder, self.passage = folder / f"{out.resolve().name}-{digest[:8]}", passage
        if type(passage.handed[0]) is not dict or any(call.sources for call in passage.calls):
            raise UserError(
                "--keep-states keeps hidden states alone, but layers of this model also hand something else "
                "on to later layers; drop it"
            )
        own = own_windows(windows, seqlen, passage.compute.ranks)
        self._first = own.start // passage.shard

    def needed(self) -> int:
        """Bytes that this process's states take at most."""
        states = [*self.passage.hidden, *self.passage.originals]
        return LAYERS_KEPT * sum(tensor.numel() * tensor.element_size() for tensor in states)

    def require_space(self) -> int:
        """Refuse a folder that cannot be made, or that has too little space for all processes of a machine.

        Returns
        -------
        int
            Bytes that the states of this machine's processes take at most.

        Raises
        ------
        UserError
            In every process.
        """
        ranks, problem = self.passage.compute.ranks, None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = sum(file.stat().st_size for file in self.folder.rglob("*.safetensors"))
            free = shutil.disk_usage(self.folder).free + kept
            here = ranks.gather([socket.gethostname(), self.needed()])
        except OSError as error:
            problem = f"{self.folder} cannot be created: {error.strerror}"
            here, free = ranks.gather([socket.gethostname(), 0]), 0
        self._remove_if_empty()
        needed = sum(count for host, count in here if host == socket.gethostname())
        if problem is None and free < needed:
            problem = (
                f"hidden states need {needed / 1e9:.2f} GB in {self.folder}, {free / 1e9:.2f} GB are free; "
                "free some, or drop --keep-states"
            )
        if found := next((other for other in ranks.gather(problem) if other is not None), None):
            raise UserError(found)
        return needed

    def save(self, layer: int) -> None:
        """Write the states after so many layers.

        Raises
        ------
        UserError
            If they cannot be written.
        """
        target = self._folder(layer)
        try:
            target.mkdir(parents=True, exist_ok=True)
            for file, windows in self._shards(layer):
                partial = file.with_suffix(f".{os.getpid()}.partial")
                save_file(self._tensors(windows), partial)
                os.replace(partial, file)
        except (OSError, SafetensorError) as error:
            free = shutil.disk_usage(self.folder).free / 1e6 if self.folder.exists() else 0
            raise UserError(
                f"hidden states could not be written to {target}: {error} ({free:.0f} MB free on that disk); "
                "free some and repeat the command with --resume, or without --keep-states"
            ) from None

    def load(self, layer: int, checksums: dict[str, int]) -> bool:
        """Read the states after so many layers.

        Parameters
        ----------
        layer : int
            Number of layers.
        checksums : dict of str to int
            Checksums of "hidden" and "originals" over all processes.

        Returns
        -------
        bool
            The same in all processes: False if one lacks any of its own, or they are not the noted ones. The
            hidden states of the passage are then as they were.
        """
        found: list[tuple[range, dict[str, torch.Tensor]]] = []
        for file, windows in self._shards(layer):
            try:
                tensors = load_file(file)
            except (OSError, SafetensorError):
                break
            shapes = {name: tensor.shape for name, tensor in self._tensors(windows).items()}
            if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
                break
            found.append((windows, tensors))
        missing = len(self._shards(layer)) - len(found)
        sums = (
            [sum_bits([tensors[name] for _, tensors in found]) for name in checksums] if not missing else []
        )
        everywhere = self.passage.compute.ranks.total([missing, *(sums or [0] * len(checksums))])
        if everywhere != [0, *checksums.values()]:
            return False
        for windows, tensors in found:
            for name in checksums:
                for window, kept in zip(windows, tensors[name], strict=True):
                    getattr(self.passage, name)[window].copy_(kept)
        return True

    def forget(self, but: int | None = None) -> None:
        """Delete this process's states, but for those after so many layers."""
        names = [file.stem for file, _ in self._shards(0)]
        for folder in self.folder.glob("layer-*"):
            if but is None or folder != self._folder(but):
                for file in [file for name in names for file in folder.glob(f"{name}.*")]:
                    file.unlink(missing_ok=True)
                with suppress(OSError):  # another process has files there, or has deleted it
                    folder.rmdir()
        if but is None:
            self._remove_if_empty()

    def _remove_if_empty(self) -> None:
        with suppress(OSError):
            self.folder.rmdir()
            self.folder.parent.rmdir()

    def _folder(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}"

    def _shards(self, layer: int) -> list[tuple[Path, range]]:
        """Files of this process's shards, and the places of their windows."""
        size, count = self.passage.shard, len(self.passage.hidden)
        return [
            (
                self._folder(layer) / f"shard-{self._first + first // size:05d}.safetensors",
                range(first, min(first + size, count)),
            )
            for first in range(0, count, size)
        ]

    def _tensors(self, windows: range) -> dict[str, torch.Tensor]:
        kept = {"hidden": self.passage.hidden, "originals": self.passage.originals}
        return {
            name: torch.stack([states[window] for window in windows])
            for name, states in kept.items()
            if states
        }
