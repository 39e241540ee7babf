"""Plants faults in `reference/` and `gpu/`, one at a time, and shows which of them the tests notice.

Existing mutation testers (mutmut, cosmic-ray) know neither barriers nor ties nor axes, and start a process
with NumPy, SciPy and Numba for every fault, where this forks one that has them loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.cli import run
from harness.errors import UserError
from tests.faults import cuda, outcome, plant
from tests.faults.fault import MODULE_LEVEL, Fault
from tests.faults.judge import PASSED, UNCOMPILED
from tests.faults.outcome import Journal, Key, Verdict, digest

DESCRIPTION = """\
Plant faults in reference/ and gpu/ and show which of them the tests notice.

A fault is one small change of the source: another operator, comparison, sign,
constant, index, axis or type, a dropped term, factor, statement or barrier, a
condition that is always true or false, a tie that goes the other way. Each is
planted alone, in a copy of the project; nothing here is touched. The tests of
the package run until one fails: the fault is caught. A fault that all of them
pass is a survivor. It needs a test, or a reason in tests/faults/survivors.toml
why no test can notice it; where there is one, only tests that are likely to fail
are run, for some 20 seconds.

Python and CUDA C++ are judged. Tests compile the latter for a CPU, where
instructions.cuh is replaced: its faults are not planted. Where others do not
compile they are only counted.

The outcome is written to tests/faults/outcome.json, file by file as they are
completed. Every verdict is kept in tests/faults/journal.jsonl as it comes, so
nothing is lost when the run is killed: --resume goes on from there.

It needs no GPU, and what the tests need: numpy, scipy, safetensors, torch,
numba-cuda, pytest and hypothesis, g++ for CUDA C++; and tree-sitter-cuda."""

EPILOG = """\
examples:
  python -m tests.faults                            all faults; a night on one core
  python -m tests.faults --resume                   only what has changed, or was not reached
  python -m tests.faults --package reference
  python -m tests.faults --file gpu/ssr.py          after a change of this file
  python -m tests.faults --file gpu/kernels/decode.cu --list   what would be planted

exit code: 0 every survivor has a reason, 1 some have none (they are printed as they
are entered into survivors.toml), 2 the tests fail without a fault, or bad usage"""

ROOT = Path(__file__).parents[2]
# What a copy of the project needs.
COPIED = ("reference", "gpu", "harness", "golden", "tests", "pyproject.toml")
PLANTERS = {".py": plant.find_faults, ".cu": cuda.find_faults, ".cuh": cuda.find_faults}
HASHED = {*PLANTERS, ".cpp", ".hpp"}
# Instructions that tests/gpu/emulation.cpp replaces on a CPU: nothing runs a fault in them.
EMULATED = "instructions.cuh"
# A fault in the reference must be noticed by its own tests, not by those of what is compared with it.
TESTS = {
    "reference": ("tests/reference", "tests/golden/test_reference.py"),
    "gpu": ("tests/gpu",),
}


class FailingTests(UserError):
    """The tests do not pass as they are; the message names those that fail."""


@dataclass
class Project:
    """Where the sources and their tests lie.

    Attributes
    ----------
    root : Path
        Folder of the project.
    tests : dict of str to tuple of str
        Paths of the tests that judge each package.
    copied : tuple of str
        What of the folder the tests need.
    patience : float
        Seconds that a test may take beyond ten times what it takes without a fault.
    brief : float
        Seconds of tests, without a fault, that judge one of which somebody says that no test can notice it.
    """

    root: Path = ROOT
    tests: dict[str, tuple[str, ...]] = field(default_factory=lambda: TESTS)
    copied: tuple[str, ...] = COPIED
    patience: float = 15.0
    brief: float = 20.0

    def sources(self) -> list[str]:
        """Every file of the packages, by its path."""
        return [
            path.relative_to(self.root).as_posix()
            for package in self.tests
            for path in sorted((self.root / package).rglob("*"))
            if path.suffix in PLANTERS and path.name != EMULATED
        ]

    def faults(self, file: str) -> list[Fault]:
        """The faults of a file."""
        return PLANTERS[Path(file).suffix]((self.root / file).read_text(encoding="utf-8"), file)

    def hashes(self, package: str) -> dict[str, str]:
        """SHA-256 of the files of a package and of its tests, by path."""
        paths = [self.root / name for name in (package, *self.tests[package])]
        files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
        return {
            file.relative_to(self.root).as_posix(): digest(file)
            for file in sorted(files)
            if file.suffix in HASHED
        }


class Bench:
    """A copy of the project in which the tests of a package judge one fault after another."""

    def __init__(self, project: Project, package: str, folder: Path) -> None:
        self.folder, self.brief = folder, project.brief
        for name in project.copied:
            source = project.root / name
            if source.is_dir():
                shutil.copytree(
                    source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.jsonl")
                )
            else:
                shutil.copy(source, folder / name)
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-P", str(Path(__file__).with_name("judge.py"))),
                *(str(writing), str(project.patience), *project.tests[package]),
            ],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": str(folder),
                "PYTHONHASHSEED": "0",
                "NUMBA_ENABLE_CUDASIM": "1",
                # What is compiled for the CPU checks no index unless told to.
                "NUMBA_BOUNDSCHECK": "1",
                # One process, one core: small matrices gain nothing from a second.
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[writing],
            text=True,
        )
        os.close(writing)
        self.answers = os.fdopen(reading, encoding="utf-8")
        ready = self._answer()
        if ready["code"] != 0:
            raise FailingTests(f"the tests of {package} fail without a fault: {', '.join(ready['failed'])}")

    def judge(self, fault: Fault, only: list[str] | None, briefly: bool) -> tuple[Verdict, float]:
        """Plant a fault, run the tests, `only` some files or those likely to fail, and take it out again."""
        file = self.folder / fault.file
        sound = file.read_text(encoding="utf-8")
        try:
            self._write(file, fault.planted(sound))
            by, seconds = self._ask(fault.file, fault.function, only, self.brief if briefly else None)
        finally:
            self._write(file, sound)
        return Verdict(fault, by), seconds

    def check(self, file: str) -> None:
        """Judge a file as it is: tests that fail because it is loaded again would catch any fault of it.

        Raises
        ------
        FailingTests
            If a test fails.
        """
        by, _ = self._ask(file, MODULE_LEVEL, None, None)
        if by is not None:
            raise FailingTests(f"{file} is sound and does not pass {by}: its verdicts mean nothing")

    def _write(self, file: Path, text: str) -> None:
        # Python takes compiled code for that of any file of the same length and second.
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
            compiled.unlink()
        file.write_text(text, encoding="utf-8")

    def _ask(
        self, file: str, function: str, only: list[str] | None, budget: float | None
    ) -> tuple[str | None, float]:
        assert self.process.stdin is not None
        request = {"file": file, "function": function, "only": only, "budget": budget}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self._answer()
        if not answer["by"]:
            raise FailingTests(f"the tests could not be run on a fault of {file}, {function}")
        return None if answer["by"] == PASSED else answer["by"], answer["seconds"]

    def _answer(self) -> dict[str, Any]:
        line = self.answers.readline()
        if not line:
            raise FailingTests(f"the process that runs the tests ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process of the tests."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.answers.close()


@contextlib.contextmanager
def bench(project: Project, package: str) -> Iterator[Bench]:
    """A bench that is cleared away afterwards."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        made = Bench(project, package, Path(folder).resolve())
        try:
            yield made
        finally:
            made.close()


@dataclass
class Judged:
    """What came of all faults of one file, which had this hash when they were planted.

    Changes of CUDA C++ that do not compile are no faults, and only counted.
    """

    file: str
    sha256: str
    verdicts: list[Verdict]
    uncompiled: int


def judge_files(
    project: Project, files: list[str], journal: Journal, resume: bool, explained: Container[Key] = ()
) -> Iterator[Judged]:
    """Judge every fault of some files, each file as it is done; none again that the journal knows.

    Faults that are `explained`, as none that a test can notice, are judged briefly.

    Raises
    ------
    FailingTests
        If the tests fail without a fault.
    """
    for package in project.tests:
        hashes = project.hashes(package)
        faults = {file: project.faults(file) for file in files if Path(file).parts[0] == package}
        found = {
            fault: journal.find(fault, hashes, fault.key in explained) if resume else (None, None)
            for own in faults.values()
            for fault in own
        }
        left = sum(verdict is None for verdict, _ in found.values())
        with contextlib.ExitStack() as stack:
            if left:
                print(f"{package}: running the tests without a fault", file=sys.stderr)
                at = stack.enter_context(bench(project, package))
                progress = stack.enter_context(_Progress(package, left))
            for file, own in faults.items():
                verdicts = []
                for fault in own:
                    verdict, unseen = found[fault]
                    if verdict is None:
                        briefly = fault.key in explained
                        verdict, seconds = at.judge(fault, unseen, briefly)
                        journal.add(verdict, hashes, seconds, briefly)
                        progress.show(verdict)
                    verdicts.append(verdict)
                if left and own and all(verdict.by for verdict in verdicts):
                    at.check(file)
                compiled = [verdict for verdict in verdicts if verdict.by != UNCOMPILED]
                yield Judged(file, hashes[file], compiled, len(verdicts) - len(compiled))


class _Progress:
    """A bar of tqdm where it is installed and someone watches, else a line for every hundred faults."""

    def __init__(self, package: str, total: int) -> None:
        self.total, self.done, self.survived = total, 0, 0
        self.bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                pass
            else:
                self.bar = tqdm(total=total, desc=package, unit="fault", smoothing=0.02)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, verdict: Verdict) -> None:
        """Count a verdict; a survivor is shown as it is found."""
        self.done += 1
        self.survived += verdict.by is None
        write = self.bar.write if self.bar is not None else lambda text: print(text, flush=True)
        if verdict.by is None:
            write(f"survived: {describe(verdict.fault)}")
        if self.bar is not None:
            self.bar.set_postfix(survived=self.survived, file=verdict.fault.file, refresh=False)
            self.bar.update()
        elif self.done % 100 == 0 or self.done == self.total:
            print(f"{self.done} of {self.total}, {self.survived} survived", file=sys.stderr, flush=True)


def describe(fault: Fault) -> str:
    """A fault as people read it."""
    return f"{fault.file}:{fault.line} {fault.function}: {fault.change}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    project = Project()
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--package", choices=list(project.tests), help="only this package (both)")
    parser.add_argument(
        "--file",
        action="append",
        metavar="PATH",
        help="only this file, such as gpu/ssr.py; may be given more than once (all)",
    )
    parser.add_argument("--list", action="store_true", help="print the faults and plant none")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the verdicts of earlier runs where neither the file nor the tests have changed since",
    )
    options = parser.parse_args(arguments)
    sources = project.sources()
    if unknown := set(options.file or ()) - set(sources):
        parser.error(f"no such source: {', '.join(sorted(unknown))}; known are {', '.join(sources)}")
    files = [
        file
        for file in sources
        if file in (options.file or sources) and options.package in (None, Path(file).parts[0])
    ]
    if options.list:
        for file in files:
            for fault in project.faults(file):
                print(describe(fault))
        return 0
    return _run(project, files, options.resume)


def _run(project: Project, files: list[str], resume: bool) -> int:
    reasons = outcome.load_reasons()
    unexplained: list[Verdict] = []
    idle: list[Key] = []
    for judged in judge_files(project, files, Journal(outcome.JOURNAL, project.root), resume, reasons):
        file, verdicts = judged.file, judged.verdicts
        outcome.write_outcome(outcome.OUTCOME, file, judged.sha256, verdicts, reasons, project.sources())
        survivors = [verdict for verdict in verdicts if verdict.by is None]
        explained = {verdict.fault.key for verdict in survivors} & reasons.keys()
        print(f"{file}: {len(verdicts)} faults, {len(survivors)} survive, {len(explained)} of them explained")
        if judged.uncompiled:
            print(f"{file}: {judged.uncompiled} more changes do not compile")
        unexplained += [verdict for verdict in survivors if verdict.fault.key not in explained]
        idle += [key for key in reasons if key[0] == file and key not in explained]
    for key in idle:
        print(f"survivors.toml explains what does not survive or is not planted: {' '.join(key)}")
    if unexplained:
        print(f"{len(unexplained)} survivors without a reason; for {outcome.REASONS.name}:\n")
        print(outcome.as_reasons(unexplained))
    return 1 if unexplained else 0


if __name__ == "__main__":
    run(main)
