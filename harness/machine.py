"""Facts about this machine: versions, memory, processor, durations in words."""

from __future__ import annotations

import os
import platform
import sys
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
    """Those libraries that are installed, and their versions."""
    installed = {}
    for library in LIBRARIES:
        try:
            installed[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return installed


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they can change a result."""
    return {
        "versions": {"python": platform.python_version(), **versions()},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }


def peak_memory() -> int:
    """Most bytes this process has had resident; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows; psutil knows the peak there, and on no other system
        return getattr(psutil.Process().memory_info(), "peak_wset", 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def host_memory() -> int:
    """Bytes of this machine's memory."""
    return int(psutil.virtual_memory().total)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return {"cpu": name, "memory_gb": round(host_memory() / 1e9, 1), **environment()}


def duration(seconds: float) -> str:
    """A length of time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
