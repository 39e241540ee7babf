"""Verify and measure the GPU backend on this machine's GPU: python -m harness.hardware [PART ...]."""

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
from harness.progress import say_on_stdout

RECORD = "golden/gpu-verified.json"
FULL_SIZE = "tests/gpu/test_full_size.py"
COMPILATION = "tests/gpu/test_compilation.py"

# In a first run, tests mostly wait for CuPy and Numba to compile kernels, each on one core of the host.
WORKERS = 8

# Every part: what it checks or measures, and the command that it runs.
PARTS = {
    "tests": (
        "all tests of the GPU backend, except full-size tests and tests that need no GPU",
        f"python -m pytest tests/gpu --ignore {FULL_SIZE} --ignore {COMPILATION}",
    ),
    "golden": (
        "all golden cases; updates the record",
        f"python -m harness.verify --backend gpu --record {RECORD}",
    ),
    "full-size": (
        "matrices of the sizes of a 7B model, against the reference",
        f"python -m pytest {FULL_SIZE}::test_output_error_is_that_of_the_reference",
    ),
    "largest": (
        "an 8192 x 28672 matrix; its first blocks against the reference",
        f"python -m pytest {FULL_SIZE} -klargest",
    ),
    "model": (
        "every matrix of a real model, against the reference; updates the record",
        f"python -m harness.verify --backend gpu --model --record {RECORD}",
    ),
    "speed": (
        "quantization at large model shapes",
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
        "tokens per second of ternary and dense models",
        "python -m harness.benchmark generate benchmarks/generate.json --shape llama-7b",
    ),
    "generation-65b": (
        "the same for a quarter of a 65B model, whose dense weights do not fit on one GPU",
        "python -m harness.benchmark generate benchmarks/generate-65b.json --shape llama-65b --layers 20",
    ),
    "sanitizer": (
        "the packed kernels under compute-sanitizer, if it is installed",
        # CuPy and torch probe the CUDA runtime with calls that may fail, and handle the failure.
        "compute-sanitizer --report-api-errors no --error-exitcode 1 "
        "python -m pytest -x tests/gpu/test_matmul.py tests/gpu/test_tensor_cores.py "
        "tests/gpu/test_warpgroup.py tests/gpu/test_fitting.py tests/gpu/test_descent.py "
        "tests/gpu/test_feedforward.py",
    ),
    "memory": (
        "quantization at the shape of a 65B model, in 40 GB of GPU memory",
        "python -m harness.benchmark quantize benchmarks/quantize-65b.json --backend gpu --layers 2 "
        "--shape llama-65b --device-memory 40",
    ),
}

DESCRIPTION = f"""\
Run all checks and benchmarks of the GPU backend that need a CUDA GPU. Run this in a clone of the
repository; it uses the installed versions, without tox. Verified files are recorded in
{RECORD}, benchmark results in benchmarks/. A part that fails does not stop the others.

parts:
""" + "\n".join(f"  {name:14} {what}" for name, (what, _) in PARTS.items())


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.hardware", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run; all by default")
    parts = parser.parse_args().parts or list(PARTS)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    require_device()
    return run_parts({part: command_of(part) for part in parts})


def command_of(part: str) -> list[str]:
    """Return the command of a part; its tests run in parallel if pytest-xdist is installed."""
    words = PARTS[part][1].split()
    if part == "tests" and importlib.util.find_spec("xdist") is not None:
        words += ["--numprocesses", str(WORKERS)]
    return words


def require_device() -> None:
    """Refuse to run without a GPU, or outside a clone."""
    try:
        print(load_backend("gpu").package.identity())
    except RuntimeError as error:
        raise UserError(f"{error}; these checks need a CUDA GPU") from None
    if not Path(FULL_SIZE).is_file():
        raise UserError(f"{FULL_SIZE} not found; run this in the root of a clone of the repository")


def _missing_requirement(command: list[str]) -> str | None:
    """Name the first program or package that a command needs and this machine lacks."""
    if command[0] != "python" and shutil.which(command[0]) is None:
        return command[0]
    needed = (EMBEDDED_PACKAGE, "gguf") if "--model" in command else ()
    return next((package for package in needed if importlib.util.find_spec(package) is None), None)


def run_parts(commands: dict[str, list[str]]) -> int:
    """Run the commands in turn; return 0 if every command that could run passed, else `EXIT_MISS`."""
    outcomes = []
    for part, command in commands.items():
        say_on_stdout(f"== {part}: {' '.join(command)}")
        if missing := _missing_requirement(command):
            outcomes.append((part, 0, f"not run: {missing} is not installed"))
            continue
        begin = time.perf_counter()
        here = [sys.executable if word == "python" else word for word in command]
        code = subprocess.run(here).returncode
        outcome = "passed" if code == 0 else f"FAILED with exit code {code}"
        outcomes.append((part, code, f"{outcome} in {duration(time.perf_counter() - begin)}"))
    for part, _, outcome in outcomes:
        say_on_stdout(f"{part:14} {outcome}")
    return EXIT_MISS if any(code for _, code, _ in outcomes) else 0


if __name__ == "__main__":
    run(main)
