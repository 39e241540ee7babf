"""Plants faults in `reference/` and `gpu/`, one at a time, and shows which of them the tests notice.

mutmut 3.8 does this for plain Python, and has been run on `reference/`. It skips functions with a decorator,
which all bodies of Numba kernels have, knows no CUDA C++, and none of barriers, ties and axes.
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
instructions.cuh is replaced: its faults are not planted. Changes that do not
compile are no faults, and only counted.

Every verdict is written to tests/faults/outcome.jsonl as it comes.

It needs no GPU, and what the tests need: numpy, scipy, safetensors, torch,
numba-cuda, pytest and hypothesis, g++ for CUDA C++; and tree-sitter-cuda."""

EPILOG = """\
examples:
  python -m tests.faults --since HEAD~1             after a change: the functions it touched
  python -m tests.faults --file gpu/ssr.py          one file
  python -m tests.faults --file gpu/kernels/decode.cu --list   what would be planted
  python -m tests.faults --package reference        in an hour or two
  python -m tests.faults                            all faults; a night on one core

exit code: 0 every survivor has a reason, 1 some have none (they are printed as they
are entered into survivors.toml), 2 the tests fail without a fault, or bad usage"""

ROOT = Path(__file__).parents[2]
PLANTERS = {".py": plant.find_faults, ".cu": cuda.find_faults, ".cuh": cuda.find_faults}
# Instructions that tests/gpu/emulation.cpp replaces on a CPU: nothing runs a fault in them.
EMULATED = "instructions.cuh"
# A fault in the reference must be noticed by its own tests, not by those of what is compared with it.
TESTS = {
    "reference": ("tests/reference", "tests/golden/test_reference.py"),
    "gpu": ("tests/gpu",),
}
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "NUMBA_ENABLE_CUDASIM": "1",
    # What is compiled for the CPU checks no index unless told to.
    "NUMBA_BOUNDSCHECK": "1",
    # One process, one core: small matrices gain nothing from a second.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
# A hunk of a diff without context: the file, or where its lines lie now.
HUNK = re.compile(r"^--- .*\n\+\+\+ (?P<file>.*)$|^@@ -\S+ \+(?P<first>\d+)(?:,(?P<count>\d+))? @@", re.M)


class Unjudged(Exception):
    """The tests cannot judge: they fail as they are, or could not be run."""


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
        Seconds of tests, without a fault, that judge one of which a reason says that no test can notice it.
    """

    root: Path = ROOT
    tests: dict[str, tuple[str, ...]] = field(default_factory=lambda: TESTS)
    copied: tuple[str, ...] = ("reference", "gpu", "harness", "golden", "tests", "pyproject.toml")
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

    def changed(self, revision: str) -> dict[str, set[int]]:
        """Lines of the sources that differ from a commit, those around a gap included.

        Raises
        ------
        Unjudged
            If git cannot tell.
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
    """Judge faults of one package, those of a file in a row, in a copy of the project.

    Faults that are `explained`, as none that a test can notice, are judged briefly.

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
                        raise Unjudged(f"the tests could not be run on a fault of {fault.file}")
                    yield Verdict(fault, answer["by"], answer["seconds"])
                elif answer.get("sound", PASSED) != PASSED:
                    raise Unjudged(f"{fault.file} is sound and does not pass {answer['sound']}")
            if process.wait() != 0:
                raise Unjudged(f"the process that runs the tests ended with {process.returncode}")
        finally:
            process.kill()
            process.wait()


def describe(fault: Fault) -> str:
    """A fault as people read it."""
    return f"{fault.file}:{fault.line} {fault.function}: {fault.change}"


def run(project: Project, faults: list[Fault]) -> int:
    """Judge faults and report; returns the exit code."""
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
            + (f"; {uncompiled} more changes do not compile" if uncompiled else "")
        )
    for verdict in verdicts:
        if verdict.by != PASSED and verdict.fault.key in reasons:
            print(f"survivors.toml explains what {verdict.by} notices: {describe(verdict.fault)}")
    unexplained = [v.fault for v in verdicts if v.by == PASSED and v.fault.key not in reasons]
    if unexplained:
        print(f"{len(unexplained)} survivors without a reason; for {outcome.REASONS.name}:\n")
        print(outcome.as_reasons(unexplained))
    return 1 if unexplained else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    project = Project()
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--package", choices=list(project.tests), help="only this package (both)")
    add("--file", action="append", metavar="PATH", help="only this file; may be given more than once (all)")
    add("--since", metavar="REV", help="only functions and lines that differ from this commit (all)")
    add("--list", action="store_true", help="print the faults and plant none")
    add(
        "--resume", action="store_true", help="keep the verdicts of earlier runs if nothing has changed since"
    )
    options = parser.parse_args(arguments)
    sources = project.sources()
    if unknown := set(options.file or ()) - set(sources):
        parser.error(f"no such source: {', '.join(sorted(unknown))}; known are {', '.join(sources)}")
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
            print("no fault to plant")
            return 0
        return run(project, faults)
    except (Unjudged, ReasonsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
