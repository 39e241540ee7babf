"""Run the tests on one fault after another, each in a fork of a process with all modules loaded.

This is a separate program in one file, because it runs in a copy of a project with other `tests`. It reads
the faults from standard input, and first runs all tests without a fault; this records which functions each
test runs, compiles the kernels, and loads slow modules. For each fault it forks a child, which unloads the
faulty module and all modules that import it, and runs the tests until one fails. It writes one answer per
line to standard output.
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

# A test hangs if it takes longer than this multiple of its normal duration plus the patience.
SLOWER = 10.0
# Limit on memory: a fault may allocate endlessly.
MEMORY = 12 * 2**30
OPTIONS = ["-q", "-W", "ignore", "--tb=no", "--no-header", "--no-summary"]
OPTIONS += ["-p", "no:cacheprovider", "-p", "no:faulthandler"]
# The next run empties it; a new folder for each run would accumulate.
OPTIONS += ["--basetemp=scratch"]

PASSED = "passed"
# Verdict on a change of CUDA C++ that does not compile, and so is not a fault.
UNCOMPILED = "does not compile"
# Audit event of tests/gpu/emulation.py: a test runs a source of CUDA C++, and whether without a change.
LAUNCH = "emulation.launch"
# A function: its file and its outermost name.
Place = tuple[str, str]
# Sort key of a test: whether it skips the faulty function, whether its file has another name, its seconds.
Rank = tuple[bool, bool, float]


class Recorder:
    """Pytest plugin: records the duration of every test, and the project functions it runs."""

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
        """Attribute functions that run in this context to these names."""
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
        # Functions that run while a file is imported, for example to build its cases, count for the file.
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
    """Pytest plugin of a child: runs the tests by rank, and exits at the first failure.

    Parameters
    ----------
    answer : int
        File descriptor for the verdict.
    ranks : dict of str to Rank
        The tests to run.
    limits : dict of str to float
        Time limit of each test in seconds.
    compiled : bool
        Whether the fault is in a source that tests compile.
    """

    def __init__(self, answer: int, ranks: dict[str, Rank], limits: dict[str, float], compiled: bool) -> None:
        self.answer, self.ranks, self.limits, self.compiled = answer, ranks, limits, compiled

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        # Set before the tests are imported, because they read the settings then. No need to shrink failures.
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
    """The tests of a package, after they passed once without a fault.

    Parameters
    ----------
    patience : float
        A test times out after ten times its normal duration plus this many seconds.
    brief : float
        For a fault with a reason in survivors.toml: total seconds of tests to run, by normal duration.
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
        # Freeze permanent objects: the collector's marks would copy their pages into every child.
        gc.collect()
        gc.freeze()

    def ranks(self, file: str, function: str) -> dict[str, Rank]:
        """Rank the tests that can detect a fault, most likely first."""
        if not file.endswith(".py"):
            return self.launching(Path(file).name)
        place, stem = (file, function.split(".")[0]), f"test_{Path(file).stem}."
        # Any test may detect a fault in import-time code, or in compiled code, where calls are not recorded.
        everywhere = function.startswith("<") or _module(Path(file)) in self.untraced
        chosen = {name for name in map(_file, self.recorder.seconds) if everywhere or place in self.ran[name]}
        return {
            nodeid: (place not in self.ran[nodeid], stem not in nodeid, seconds)
            for nodeid, seconds in self.recorder.seconds.items()
            # A test file that never runs the package here reads its source, or starts programs that run it.
            if not chosen or _file(nodeid) in chosen or not self.runs(_file(nodeid), Path(file).parts[0])
        }

    def launching(self, source: str) -> dict[str, Rank]:
        """Rank the tests that run a source of CUDA C++ unchanged; for a header, those that run any source.

        Tests that patch the source are excluded: they may fail merely because the patch no longer applies.
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
        """Find a module and all modules that import it at load time; they must be reloaded together.

        Imports inside functions are resolved at every call, so they do not count. This spares modules that
        cannot be loaded twice, because they register something globally.
        """
        found = {module}
        while more := set().union(*(self.importers.get(name, set()) for name in found)) - found:
            found |= more
        return found

    def judge(self, file: str, function: str, briefly: bool = False) -> str:
        """Judge the fault now in a file: the test that failed, "crash", "hang", or `PASSED`.

        The result is `UNCOMPILED` if the source does not compile, and empty if the tests could not run.
        """
        ranks = self.ranks(file, function)
        if briefly:
            ordered = sorted(ranks, key=lambda nodeid: ranks[nodeid])
            spent = itertools.accumulate((self.recorder.seconds[nodeid] for nodeid in ordered), initial=0.0)
            ranks = {
                nodeid: ranks[nodeid] for nodeid, s in zip(ordered, spent, strict=False) if s < self.brief
            }
        files = {_file(nodeid) for nodeid in ranks}
        # The test file that detected the last fault of the function probably detects this one: load it alone.
        first = self.noticed.get((file, function))
        said = self._run(file, {first}, ranks) if first in files else PASSED
        if said in ("", PASSED):
            said = self._run(file, files, ranks)
        if said in ranks:
            self.noticed[file, function] = _file(said)
        return said

    def _run(self, file: str, tests: set[str], ranks: dict[str, Rank]) -> str:
        """Run some test files in a fork, with a fault in `file`; the verdict is empty if none could run."""
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
            os.killpg(child, signal.SIGKILL)  # programs that a test started
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
    """Find the modules that import each module at load time, and the modules that use Numba."""
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
        # Importing a module imports its package first.
        for name in names | {name.rpartition(".")[0] for name in (*names, module)}:
            importers.setdefault(name, set()).add(module)
    return importers, untraced


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _write(file: Path, data: bytes) -> None:
    # Python reuses compiled code for a source of the same size and modification time in seconds.
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        compiled.unlink()
    file.write_bytes(data)


def answers(patience: float, brief: float, tests: list[str], faults: list[dict]) -> Iterator[dict[str, Any]]:
    """Yield the tests that fail without a fault, then the verdict on each fault, file by file."""
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
        # A test that fails merely because the file is reloaded would detect every fault of it.
        yield {"sound": judge.judge(name, "<module>") if caught else PASSED}


def main() -> None:
    """Judge the faults given on standard input."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Discard the output of tests.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    request = json.load(sys.stdin)
    for answer in answers(**request):
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
