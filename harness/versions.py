"""Versions of what can change a result."""

from __future__ import annotations

from importlib import metadata

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
