"""Facts about this machine: versions, memory, CPU; durations in words."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

LIBRARIES = (
    "pt2-llm",
    "numpy",
    "scipy",
    "numba",
    "numba-cuda",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
)


def versions() -> dict[str, str]:
    """Versions of the installed libraries among `LIBRARIES`."""
    installed = {}
    for library in LIBRARIES:
        try:
            installed[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return installed


def environment() -> dict[str, Any]:
    """Versions and machine: what can change a result."""
    return {
        "versions": {"python": platform.python_version(), **versions()},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }


def peak_memory() -> int:
    """Peak resident memory of this process in bytes; 0 if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows, the only system where psutil reports the peak
        return getattr(psutil.Process().memory_info(), "peak_wset", 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def host_memory() -> int:
    """Total memory of this machine in bytes."""
    return int(psutil.virtual_memory().total)


def machine() -> dict[str, Any]:
    """Describe the machine that figures are measured on."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [
            line
            for line in cpuinfo.read_text("utf-8", "replace").splitlines()
            if line.startswith("model name")
        ]
        name = models[0].partition(":")[2].strip() if models else name
    return {"cpu": name, "memory_gb": round(host_memory() / 1e9, 1), **environment()}


def provenance(program: str) -> dict[str, Any]:
    """Return the command of a program in this process, the date and the machine, for a file of results."""

    def without_folders(word: str) -> str:
        name, colon, path = word.rpartition(":")
        return f"{name}{colon}{Path(path).name}" if Path(path).is_absolute() else word

    words = [word for word in sys.argv[1:] if word != "--resume"]  # the command that was interrupted
    return {
        "command": f"python -m {program} {shlex.join(map(without_folders, words))}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
    }


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
