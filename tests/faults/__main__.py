"""Mutation testing of `reference/` and `gpu/`: plant one fault at a time, and report which the tests detect.

mutmut 3.8 does this for plain Python, and was run on `reference/`. It skips decorated functions, which
includes all bodies of Numba kernels, does not support CUDA C++, and has no faults of barriers, ties and axes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.faults import cuda, outcome, plant
from tests.faults.fault import Fault, Key
from tests.faults.judge import PASSED, UNCOMPILED
from tests.faults.outcome import ReasonsError, Verdict

DESCRIPTION = """\
Plant faults in reference/ and gpu/ and report which of them the tests detect.

A fault is one small change of the source: another operator, comparison, sign,
constant, index, axis or type, a dropped term, factor, statement or barrier, a
condition that is always true or false, a tie broken the other way. Each fault
is planted alone, in a copy of the project; the project itself is not changed.
The tests of the package run until one fails: the fault is detected. A fault
that passes all tests is a survivor. It needs a new test, or a reason in
tests/faults/survivors.toml why no test can detect it. A fault with a reason is
tested for about 20 seconds only, by the tests most likely to fail.

Faults are planted in Python and CUDA C++. Tests compile the CUDA C++ for a CPU
and replace instructions.cuh, so that file gets no faults. Changes that do not
compile are not faults; they are only counted.

Every verdict is written to tests/faults/outcome.jsonl immediately.

No GPU is needed. Required are numpy, scipy, safetensors, torch, numba-cuda,
pytest, hypothesis and tree-sitter-cuda, and g++ for CUDA C++."""

EPILOG = """\
examples:
  python -m tests.faults --since HEAD~1             functions changed since a commit
  python -m tests.faults --file gpu/ssr.py          one file
  python -m tests.faults --file gpu/kernels/decode.cu --list   list faults, plant none
  python -m tests.faults --package reference        one package; takes 1 to 2 hours
  python -m tests.faults                            all faults; takes a night on one core

exit code: 0 every survivor has a reason; 1 some have none (they are printed in the
format of survivors.toml); 2 the tests fail without a fault, or usage is wrong"""

ROOT = Path(__file__).parents[2]
PLANTERS = {".py": plant.find_faults, ".cu": cuda.find_faults, ".cuh": cuda.find_faults}
# tests/gpu/emulation.cpp replaces these instructions on a CPU, so no test would run a fault in them.
EMULATED = "instructions.cuh"
# Only the reference's own tests count for it, not the tests that compare other code with it.
TESTS = {
    "reference": ("tests/reference", "tests/golden/test_reference.py"),
    "gpu": ("tests/gpu",),
}
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "NUMBA_ENABLE_CUDASIM": "1",
    # Numba's CPU code checks no index unless told to.
    "NUMBA_BOUNDSCHECK": "1",
    # One process, one core: small matrices gain nothing from a second.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
# Headers of a diff without context: the new file name, or the new line numbers of a hunk.
HUNK = re.compile(r"^--- .*\n\+\+\+ (?P<file>.*)$|^@@ -\S+ \+(?P<first>\d+)(?:,(?P<count>\d+))? @@", re.M)


class Unjudged(Exception):
    """The tests cannot judge faults: they fail without a fault, or could not run."""


@dataclass
class Project:
    """The folders of sources and tests, and the time limits.

    Attributes
    ----------
    root : Path
        Folder of the project.
    tests : dict of str to tuple of str
        Paths of the tests that judge each package.
    copied : tuple of str
        Files and folders of the project that the tests need.
    patience : float
        A test times out after ten times its normal duration plus this many seconds.
    brief : float
        For a fault with a reason in survivors.toml: total seconds of tests to run, by normal duration.
    """

    root: Path = ROOT
    tests: dict[str, tuple[str, ...]] = field(default_factory=lambda: TESTS)
    copied: tuple[str, ...] = ("reference", "gpu", "harness", "golden", "tests", "pyproject.toml")
    patience: float = 15.0
    brief: float = 20.0

    def sources(self) -> list[str]:
        """List the source files of the packages, by path."""
        return [
            path.relative_to(self.root).as_posix()
            for package in self.tests
            for path in sorted((self.root / package).rglob("*"))
            if path.suffix in PLANTERS and path.name != EMULATED
        ]

    def faults(self, file: str) -> list[Fault]:
        """The faults of a file."""
        return PLANTERS[Path(file).suffix]((self.root / file).read_text(encoding="utf-8"), file)

    def changed(self, revision: str) -> dict[str, set[int]]:
        """Find the source lines that differ from a commit, including the lines around a deletion.

        Raises
        ------
        Unjudged
            If git fails.
        """

        def git(*arguments: str) -> str:
            result = subprocess.run(
                ["git", *arguments, "--", *self.tests], cwd=self.root, capture_output=True, text=True
            )
            if result.returncode != 0:
                raise Unjudged(result.stderr.strip().partition("\n")[0])
            return result.stdout

        lines: dict[str, set[int]] = {}
        for file in git("ls-files", "--others", "--exclude-standard").splitlines():
            lines[file] = set(range(1, 2 + (self.root / file).read_bytes().count(b"\n")))
        file = ""
        for hunk in HUNK.finditer(git("diff", "--unified=0", "--no-prefix", "--relative", revision)):
            if hunk["file"]:
                file = hunk["file"]
            else:
                first, count = int(hunk["first"]), int(hunk["count"] or 1)
                lines.setdefault(file, set()).update(range(first, first + (count or 2)))
        return lines


def judge(
    project: Project, package: str, faults: list[Fault], explained: Container[Key] = ()
) -> Iterator[Verdict]:
    """Judge faults of one package, file by file, in a copy of the project.

    Faults that are `explained` (a reason says that no test can detect them) are judged briefly.

    Raises
    ------
    Unjudged
        If the tests fail without a fault.
    """
    request = {
        "patience": project.patience,
        "brief": project.brief,
        "tests": project.tests[package],
        "faults": [
            {
                **{name: getattr(fault, name) for name in ("file", "function", "start", "end", "text")},
                "briefly": fault.key in explained,
            }
            for fault in faults
        ],
    }
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for name in project.copied:
            source, copy = project.root / name, Path(folder, name)
            if source.is_dir():
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "*.jsonl"))
            else:
                shutil.copy(source, copy)
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("judge.py"))],
            cwd=folder,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            json.dump(request, process.stdin)
            process.stdin.close()
            waiting = iter(faults)
            for line in process.stdout:
                answer = json.loads(line)
                if answer.get("failed"):
                    raise Unjudged(
                        f"the tests of {package} fail without a fault: {', '.join(answer['failed'])}"
                    )
                if "by" in answer:
                    fault = next(waiting)
                    if not answer["by"]:
                        raise Unjudged(f"the tests could not run on a fault of {fault.file}")
                    yield Verdict(fault, answer["by"], answer["seconds"])
                elif answer.get("sound", PASSED) != PASSED:
                    raise Unjudged(f"{fault.file} has no fault, but fails {answer['sound']}")
            if process.wait() != 0:
                raise Unjudged(f"the process that runs the tests exited with code {process.returncode}")
        finally:
            process.kill()
            process.wait()


def describe(fault: Fault) -> str:
    """Format a fault for printing."""
    return f"{fault.file}:{fault.line} {fault.function}: {fault.change}"


def run(project: Project, faults: list[Fault]) -> int:
    """Judge faults and print a report; return the exit code."""
    reasons = outcome.load_reasons()
    verdicts: list[Verdict] = []
    with outcome.VERDICTS.open("w", encoding="utf-8") as out:
        for package in project.tests:
            own = [fault for fault in faults if Path(fault.file).parts[0] == package]
            if own:
                print(f"{package}: running the tests without a fault", file=sys.stderr)
                for done, verdict in enumerate(judge(project, package, own, reasons), 1):
                    verdicts.append(verdict)
                    print(json.dumps(asdict(verdict), ensure_ascii=False), file=out, flush=True)
                    if verdict.by == PASSED:
                        print(f"survived: {describe(verdict.fault)}", flush=True)
                    if done % 100 == 0 or done == len(own):
                        print(f"{done} of {len(own)}", file=sys.stderr, flush=True)
    for file in dict.fromkeys(fault.file for fault in faults):
        by = [(verdict.fault.key, verdict.by) for verdict in verdicts if verdict.fault.file == file]
        survivors = {key for key, said in by if said == PASSED}
        uncompiled = sum(said == UNCOMPILED for _, said in by)
        print(
            f"{file}: {len(by) - uncompiled} faults, {len(survivors)} survive, "
            f"{len(reasons.keys() & survivors)} of them explained"
            + (f"; {uncompiled} further changes do not compile" if uncompiled else "")
        )
    for verdict in verdicts:
        if verdict.by != PASSED and verdict.fault.key in reasons:
            print(f"survivors.toml has a reason, but {verdict.by} detects: {describe(verdict.fault)}")
    unexplained = [v.fault for v in verdicts if v.by == PASSED and v.fault.key not in reasons]
    if unexplained:
        print(f"{len(unexplained)} survivors without a reason; for {outcome.REASONS.name}:\n")
        print(outcome.as_reasons(unexplained))
    return 1 if unexplained else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    project = Project()
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--package", choices=list(project.tests), help="only this package (both)")
    add("--file", action="append", metavar="PATH", help="only this file; may be repeated (all)")
    add("--since", metavar="REV", help="only functions and lines that differ from this commit (all)")
    add("--list", action="store_true", help="list the faults without planting them")
    options = parser.parse_args(arguments)
    sources = project.sources()
    if unknown := set(options.file or ()) - set(sources):
        parser.error(f"no such source: {', '.join(sorted(unknown))}; choose from {', '.join(sources)}")
    try:
        changed = project.changed(options.since) if options.since else None
        faults = [
            fault
            for file in sources
            if file in (options.file or sources) and options.package in (None, Path(file).parts[0])
            if changed is None or file in changed
            for fault in project.faults(file)
            if changed is None or fault.concerns(changed[file])
        ]
        if options.list:
            for fault in faults:
                print(describe(fault))
            return 0
        if not faults:
            print("no faults to plant")
            return 0
        return run(project, faults)
    except (Unjudged, ReasonsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
