"""Verify and measure everything on this machine's CUDA device: python -m harness.hardware [PART ...]."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path

from harness.backends import load_backend
from harness.cli import EXIT_MISS, HelpFormatter, run
from harness.errors import UserError
from harness.machine import duration
from harness.models.gguf import EMBEDDED_PACKAGE

RECORD = "golden/gpu-verified.json"


FULL_SIZE = "tests/gpu/test_full_size.py"


COMPILATION = "tests/gpu/test_compilation.py"


# Most of the first run of the tests is CuPy and Numba compiling kernels on the host, each on one core.
WORKERS = 8


# What each part shows, and what it runs.
PARTS = {
    "tests": (
        "every test of the GPU backend but those of full size and those that need no device",
        f"python -m pytest tests/gpu --ignore {FULL_SIZE} --ignore {COMPILATION}",
    ),
    "golden": (
        "the golden cases, for the record",
        f"python -m harness.verify --backend gpu --record {RECORD}",
    ),
    "full-size": (
        "matrices of a 7B model's sizes against the reference",
        f"python -m pytest {FULL_SIZE}::test_output_error_is_that_of_the_reference",
    ),
    "largest": (
        "a matrix of 8192 x 28672, and its first blocks against the reference",
        f"python -m pytest {FULL_SIZE} -klargest",
    ),
    "model": (
        "every matrix of a real model against the reference, for the record",
        f"python -m harness.verify --backend gpu --model --record {RECORD}",
    ),
    "speed": (
        "quantization at the shapes of large models",
        "python -m harness.benchmark quantize benchmarks/quantize.json --backend gpu --layers 4 "
        "--shape llama-7b llama-13b llama3-8b qwen3-14b",
    ),
    "products": (
        "packed products against dense ones",
        "python -m harness.benchmark matmul benchmarks/matmul.json --dtype float16 "
        "--shape llama-7b llama-13b llama-30b llama-65b",
    ),
    "products-bf16": (
        "the same in bfloat16",
        "python -m harness.benchmark matmul benchmarks/matmul-bf16.json --dtype bfloat16 "
        "--shape llama-7b llama-65b",
    ),
    "generation": (
        "tokens a second of ternary models against dense ones",
        "python -m harness.benchmark generate benchmarks/generate.json --shape llama-7b",
    ),
    "generation-65b": (
        "the same for a quarter of a 65B model, as not all of its dense weights fit on one device",
        "python -m harness.benchmark generate benchmarks/generate-65b.json --shape llama-65b --layers 20",
    ),
    "sanitizer": (
        "the packed kernels under compute-sanitizer, if that is installed",
        # CuPy and torch ask the runtime what it may refuse to answer, and take no for an answer.
        "compute-sanitizer --report-api-errors no --error-exitcode 1 "
        "python -m pytest -x tests/gpu/test_matmul.py tests/gpu/test_tensor_cores.py "
        "tests/gpu/test_warpgroup.py tests/gpu/test_fitting.py",
    ),
    "memory": (
        "the shape of a 65B model in 40 GB of device memory",
        "python -m harness.benchmark quantize benchmarks/quantize-65b.json --backend gpu --layers 2 "
        "--shape llama-65b --device-memory 40",
    ),
}


DESCRIPTION = f"""\
Run the GPU backend through everything that needs a CUDA device, in a clone of the repository and on
whatever versions are installed there; tox is not needed. What passes is written to {RECORD},
figures go to benchmarks/. A part that fails does not stop the others.

parts:
""" + "\n".join(f"  {name:14} {what}" for name, (what, _) in PARTS.items())


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.hardware", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="which parts; all if left out")
    parts = parser.parse_args().parts or list(PARTS)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; known are {', '.join(PARTS)}")
    require_device()
    return run_parts({part: command_of(part) for part in parts})


def command_of(part: str) -> list[str]:
    """The words of a part's command; tests run side by side if pytest-xdist is installed."""
    words = PARTS[part][1].split()
    if part == "tests" and importlib.util.find_spec("xdist") is not None:
        words += ["--numprocesses", str(WORKERS)]
    return words


def require_device() -> None:
    """Refuse to run without a device, or elsewhere than in a clone."""
    try:
        print(load_backend("gpu").package.identity())
    except RuntimeError as error:
        raise UserError(f"{error}; these checks are for a CUDA device") from None
    if not Path(FULL_SIZE).is_file():
        raise UserError(f"there is no {FULL_SIZE} here; run this in a clone of the repository")


def _lacking(command: list[str]) -> str | None:
    """What a command needs that not every machine with a device has."""
    if command[0] != "python" and shutil.which(command[0]) is None:
        return command[0]
    needed = (EMBEDDED_PACKAGE, "gguf") if "--model" in command else ()
    return next((package for package in needed if importlib.util.find_spec(package) is None), None)


def run_parts(commands: dict[str, list[str]]) -> int:
    """Run commands one after the other; the exit code says whether all that could be run passed."""
    outcomes = []
    for part, command in commands.items():
        print(f"== {part}: {' '.join(command)}", flush=True)
        if lacking := _lacking(command):
            outcomes.append((part, 0, f"not run: {lacking} is not installed"))
            continue
        begin = time.perf_counter()
        here = [sys.executable if word == "python" else word for word in command]
        code = subprocess.run(here).returncode
        outcome = "passed" if code == 0 else f"FAILED with exit code {code}"
        outcomes.append((part, code, f"{outcome} in {duration(time.perf_counter() - begin)}"))
    for part, _, outcome in outcomes:
        print(f"{part:14} {outcome}")
    return EXIT_MISS if any(code for _, code, _ in outcomes) else 0


if __name__ == "__main__":
    run(main)
