"""Runs the tests on one fault after another, each in a fork of a process that has everything loaded.

A program of its own, in one file: it is started in a copy of a project, whose `tests` are not these. It
reads the faults from standard input and passes the tests once as they are, noting which functions every test
runs; this compiles the kernels and loads what is slow to load. Then it forks a child for each fault, which
forgets the faulty module and whatever imports it, and runs the tests until one fails. Answers go to standard
output, one a line.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import itertools
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import hypothesis
import pytest

# A test that takes so many times as long as without the fault, and the patience asked for, hangs.
SLOWER = 10.0
# A fault may ask for memory without end.
MEMORY = 12 * 2**30
OPTIONS = ["-q", "-W", "ignore", "--tb=no", "--no-header", "--no-summary"]
OPTIONS += ["-p", "no:cacheprovider", "-p", "no:faulthandler"]
# Emptied by the next run; folders of their own would pile up.
OPTIONS += ["--basetemp=scratch"]

PASSED = "passed"
# Of a change of CUDA C++, which is then no fault.
UNCOMPILED = "does not compile"
# Audit event of tests/gpu/emulation.py: a test runs a source of CUDA C++, and whether without a change.
LAUNCH = "emulation.launch"
# A function: its file and outermost name.
Place = tuple[str, str]
# Whether a test leaves out the faulty function, whether its file is named otherwise, and its seconds.
Rank = tuple[bool, bool, float]


class Recorder:
    """Pytest plugin: how long every test takes, and what of the project it runs."""

    def __init__(self) -> None:
        self.root = f"{Path.cwd()}{os.sep}"
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []
        self.ran: dict[str, set[Place]] = {}  # by test and by test file
        self.codes: set[CodeType] = set()
        self.launches: dict[str, set[tuple[str, bool]]] = {}  # by test
        self.launched: set[tuple[str, bool]] = set()
        sys.addaudithook(self.hear)

    @contextlib.contextmanager
    def watching(self, *names: str) -> Iterator[None]:
        """Count what runs meanwhile for these names."""
        self.codes, self.launched = set(), set()
        sys.settrace(self.trace)
        try:
            yield
        finally:
            sys.settrace(None)
            own = (code for code in self.codes if code.co_filename.startswith(self.root))
            functions = {
                (code.co_filename.removeprefix(self.root), code.co_qualname.split(".")[0]) for code in own
            }
            for name in names:
                self.ran.setdefault(name, set()).update(functions)
                self.launches[name] = self.launched

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == LAUNCH:
            self.launched.add(arguments)

    def trace(self, frame: Any, event: str, argument: Any) -> None:
        self.codes.add(frame.f_code)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Any:
        # What a file runs as it is imported, such as the making of its cases, counts for the file.
        with self.watching(collector.nodeid):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        with self.watching(item.nodeid, _file(item.nodeid)):
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        self.pytest_collectreport(report)

    def pytest_collectreport(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


class FirstFailure:
    """Pytest plugin of a child: runs the tests by rank; the first failure ends it.

    Parameters
    ----------
    answer : int
        File descriptor that the verdict is written to.
    ranks : dict of str to Rank
        The tests to run.
    limits : dict of str to float
        Seconds that each of them may take.
    compiled : bool
        Whether the fault is in a source that tests compile.
    """

    def __init__(self, answer: int, ranks: dict[str, Rank], limits: dict[str, float], compiled: bool) -> None:
        self.answer, self.ranks, self.limits, self.compiled = answer, ranks, limits, compiled

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        # Before the tests are imported, which take their settings then. Which example of a failure is
        # the smallest does not matter.
        phases = [p for p in hypothesis.settings().phases if p.name in ("explicit", "generate")]
        hypothesis.settings.register_profile("faults", hypothesis.settings(), phases=phases)
        hypothesis.settings.load_profile("faults")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if item.nodeid in self.ranks]
        items[:] = sorted(chosen, key=lambda item: self.ranks[item.nodeid])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> None:
        if self.compiled and call.excinfo is not None and call.excinfo.errisinstance(SyntaxError):
            self.end(UNCOMPILED)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        signal.setitimer(signal.ITIMER_REAL, self.limits[item.nodeid])
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            self.end(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport

    def end(self, verdict: str) -> None:
        os.write(self.answer, verdict.encode())
        os._exit(0)


class Judge:
    """The tests of a package, passed once without a fault.

    Parameters
    ----------
    patience : float
        Seconds that a test may take beyond ten times what it takes without a fault.
    brief : float
        Seconds of tests, without a fault, that judge one of which a reason says that no test can notice it.
    tests : list of str
        Files and folders of tests.
    """

    def __init__(self, patience: float, brief: float, tests: list[str]) -> None:
        self.patience, self.brief = patience, brief
        self.importers, self.untraced = _importers(Path.cwd())
        self.recorder = Recorder()
        started = time.perf_counter()
        pytest.main([*OPTIONS, *tests], plugins=[self.recorder])
        self.seconds = time.perf_counter() - started
        self.failed, self.ran = self.recorder.failed, self.recorder.ran
        self.noticed: dict[tuple[str, str], str] = {}  # the last test file by file and function
        # Objects that are here to stay are not to be copied into every child by the collector's marks.
        gc.collect()
        gc.freeze()

    def ranks(self, file: str, function: str) -> dict[str, Rank]:
        """The tests that can notice a fault, those first that are likely to."""
        if not file.endswith(".py"):
            return self.launching(Path(file).name)
        place, stem = (file, function.split(".")[0]), f"test_{Path(file).stem}."
        # Any test may notice a fault in what runs as a module is imported, or in compiled code, which leaves
        # no trace.
        everywhere = function.startswith("<") or _module(Path(file)) in self.untraced
        chosen = {name for name in map(_file, self.recorder.seconds) if everywhere or place in self.ran[name]}
        return {
            nodeid: (place not in self.ran[nodeid], stem not in nodeid, seconds)
            for nodeid, seconds in self.recorder.seconds.items()
            # A file that never runs the package here works on its source, or starts programs that run it.
            if not chosen or _file(nodeid) in chosen or not self.runs(_file(nodeid), Path(file).parts[0])
        }

    def launching(self, source: str) -> dict[str, Rank]:
        """The tests that run a source of CUDA C++ as it is, or with a header any.

        Tests that change the source themselves may find no fault for another reason: that they cannot.
        """
        return {
            nodeid: (False, False, seconds)
            for nodeid, seconds in self.recorder.seconds.items()
            if all(sound for _, sound in self.recorder.launches[nodeid])
            and any(source.endswith(("cuh", name)) for name, _ in self.recorder.launches[nodeid])
        }

    def runs(self, name: str, package: str) -> bool:
        """Whether a test file runs a function of a package."""
        return any(file.startswith(f"{package}/") and function[0] != "<" for file, function in self.ran[name])

    def holders(self, module: str) -> set[str]:
        """A module and all that hold what it is when they are loaded, and must be loaded again with it.

        What a function imports is looked up whenever it is called. Modules that cannot be loaded twice,
        as they register something somewhere, stay out of it by this.
        """
        found = {module}
        while more := set().union(*(self.importers.get(name, set()) for name in found)) - found:
            found |= more
        return found

    def judge(self, file: str, function: str, briefly: bool = False) -> str:
        """Who notices the fault that lies in a file now: a test, a "crash", a "hang", or `PASSED`.

        It is `UNCOMPILED` where nobody could, and empty where the tests could not be run at all, whatever
        the fault.
        """
        ranks = self.ranks(file, function)
        if briefly:
            ordered = sorted(ranks, key=lambda nodeid: ranks[nodeid])
            spent = itertools.accumulate((self.recorder.seconds[nodeid] for nodeid in ordered), initial=0.0)
            ranks = {
                nodeid: ranks[nodeid] for nodeid, s in zip(ordered, spent, strict=False) if s < self.brief
            }
        files = {_file(nodeid) for nodeid in ranks}
        # What noticed the last fault of the function is likely to notice this one: it is loaded alone.
        first = self.noticed.get((file, function))
        said = self._run(file, {first}, ranks) if first in files else PASSED
        if said in ("", PASSED):
            said = self._run(file, files, ranks)
        if said in ranks:
            self.noticed[file, function] = _file(said)
        return said

    def _run(self, file: str, tests: set[str], ranks: dict[str, Rank]) -> str:
        """What some test files say in a fork, with a fault in `file`; empty if none could be run."""
        reading, writing = os.pipe()
        limits = {nodeid: self.patience + SLOWER * self.recorder.seconds[nodeid] for nodeid in ranks}
        plugin = FirstFailure(writing, ranks, limits, compiled=not file.endswith(".py"))
        child = os.fork()
        if child == 0:
            self._in_child(_module(Path(file)), sorted(tests), plugin)
        os.close(writing)
        with os.fdopen(reading, "rb") as answer:
            said = answer.read().decode()
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # programs that a test had started
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            return "hang" if number == signal.SIGALRM else f"crash, {signal.Signals(number).name}"
        return said

    def _in_child(self, module: str, tests: list[str], plugin: FirstFailure) -> None:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.setitimer(signal.ITIMER_REAL, self.patience + SLOWER * self.seconds)
        verdict = ""
        try:
            stale = self.holders(module)
            for name in list(sys.modules):
                if name in stale or name.partition(".")[0] == "tests":
                    parent, _, child = name.rpartition(".")
                    if parent in sys.modules and hasattr(sys.modules[parent], child):
                        delattr(sys.modules[parent], child)
                    del sys.modules[name]
            code = pytest.main([*OPTIONS, *tests], plugins=[plugin]) if tests else None
            if code == pytest.ExitCode.OK:
                verdict = PASSED
            elif code not in (None, pytest.ExitCode.NO_TESTS_COLLECTED):
                verdict = f"pytest ended with {code!r}"
        finally:
            plugin.end(verdict)


def _importers(root: Path) -> tuple[dict[str, set[str]], set[str]]:
    """Who imports a module as it is loaded, and the modules that use Numba."""
    importers: dict[str, set[str]] = {}
    untraced = set()
    for path in root.rglob("*.py"):
        module, names = _module(path.relative_to(root)), set()
        waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            inside = ast.iter_child_nodes(node)
            waiting += [child for child in inside if not isinstance(child, ast.FunctionDef)]
        if any(name.partition(".")[0] == "numba" for name in names):
            untraced.add(module)
        # A package is imported before any module in it.
        for name in names | {name.rpartition(".")[0] for name in (*names, module)}:
            importers.setdefault(name, set()).add(module)
    return importers, untraced


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _write(file: Path, data: bytes) -> None:
    # Python takes compiled code for that of any file of the same length and second.
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        compiled.unlink()
    file.write_bytes(data)


def answers(patience: float, brief: float, tests: list[str], faults: list[dict]) -> Iterator[dict[str, Any]]:
    """The tests that fail without a fault; then who notices each fault, file by file."""
    judge = Judge(patience, brief, tests)
    yield {"failed": judge.failed}
    for name, group in itertools.groupby(faults, key=lambda fault: fault["file"]):
        file, caught = Path(name), True
        sound = file.read_bytes()
        for fault in group:
            started = time.perf_counter()
            _write(file, sound[: fault["start"]] + fault["text"].encode() + sound[fault["end"] :])
            by = judge.judge(name, fault["function"], fault["briefly"])
            _write(file, sound)
            caught &= by != PASSED
            yield {"by": by, "seconds": round(time.perf_counter() - started, 2)}
        # Tests that fail because a file is loaded again would catch any fault of it.
        yield {"sound": judge.judge(name, "<module>") if caught else PASSED}


def main() -> None:
    """Judge what is asked for."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What tests print is of no interest here.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    request = json.load(sys.stdin)
    for answer in answers(**request):
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
