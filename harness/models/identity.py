"""What an original model is, whatever it is called: checksums of the files that a run reads."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness.distributed.ranks import ALONE, Ranks
from harness.models.folder import CONFIG, TEMPLATES, weight_files
from harness.models.gguf import embedded_gguf
from harness.models.original import quiet_transformers
from harness.progress import Progress, Say

# Beside the weights: config, tokenizer, chat templates and code. Not a README or other people's weights.
PATTERNS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*merges*", "*vocab*", "*.py", f"{TEMPLATES[1]}/*")


def identify(source: str | None, say: Say, ranks: Ranks = ALONE) -> dict[str, str]:
    """Identify an original by content, so that a moved or copied model is still the same.

    Samples of the tensors would be cheaper, but would miss a single changed weight. SHA-256 takes about a
    second per GB on one core, and files are read in parallel; a run takes minutes per GB.

    Parameters
    ----------
    source : str or None
        As for `harness.models.loading.load_original`.
    say : callable
        Prints a line for the user.
    ranks : Ranks
        Processes that do this at the same time, each with its own source. Of those that see the same files,
        one reads them.

    Returns
    -------
    dict of str to str
        SHA-256 by file name; for a model id, the commit that it was resolved to, by the name of its snapshot
        in the cache.
    """
    path = embedded_gguf() if source is None else Path(source)
    if path.is_dir():
        folder, files = path, _files_of_folder(path)
    elif path.is_file():
        folder, files = path.parent, _parts(path)
    else:
        snapshot = quiet_transformers().utils.hub.cached_file(source, CONFIG)
        folder, files = Path(snapshot).parent, []
    seen = ranks.gather([socket.gethostname(), str(folder), *map(_state, files)])
    reader = seen.index(seen[ranks.rank])
    found: dict[str, str] | None = None
    if reader == ranks.rank:
        found = _checksums(folder, files, say) if files else {"commit": folder.name}
    return ranks.gather(found)[reader]


def _checksums(folder: Path, files: list[Path], say: Say) -> dict[str, str]:
    with (
        Progress("checksums of the original's files", len(files), "file", say) as step,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        found = {}
        for file, checksum in zip(files, pool.map(_checksum, files), strict=True):
            found[file.relative_to(folder).as_posix()] = checksum
            step()
    return found


def _state(file: Path) -> list[Any]:
    """What tells a file from another one on the same machine, without reading it."""
    found = file.stat()
    return [str(file), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


def _files_of_folder(folder: Path) -> list[Path]:
    beside = {file for pattern in PATTERNS for file in folder.glob(pattern) if file.is_file()}
    return sorted(beside | {folder / name for name in weight_files(folder)})


def _parts(file: Path) -> list[Path]:
    """All parts of a GGUF file that is split as llama.cpp does, or the file alone."""
    split = re.fullmatch(r"(.*)-\d{5}-of-(\d{5}\.gguf)", file.name)
    if split is None:
        return [file]
    part = re.compile(rf"{re.escape(split[1])}-\d{{5}}-of-{split[2]}")
    return sorted(other for other in file.parent.iterdir() if part.fullmatch(other.name))


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
