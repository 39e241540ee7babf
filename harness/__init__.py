"""The programs people run: quantize, evaluate, verify and benchmark ternary language models.

`harness.load` reads a ternary checkpoint back. Importing this package imports neither torch nor
transformers.
"""

from __future__ import annotations

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from harness.hf import load

        return load
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
