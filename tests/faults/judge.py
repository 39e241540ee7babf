"""Runs the tests on one fault after another, each in a fork of a process that has everything loaded.

A program of its own, in one file: it is started in a copy of a project, whose `tests` are not these. It
passes the tests once as they are, noting which code every test file runs; this compiles the kernels and loads
what is slow to load. Then it reads one request a line, and for each of them forks a child, which forgets the
faulty module and whatever imports it, and runs the tests again until one fails. Answers go to the file
descriptor it was given.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import hypothesis
import pytest

# A test that takes so many times as long as without the fault, and the patience asked for, hangs.
SLOWER = 10.0
# A fault may ask for memory without end.
MEMORY = 12 * 2**30
OPTIONS = [
    "-q",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:faulthandler",
    "-W",
    "ignore",
    "--tb=no",
    "--no-header",
    "--no-summary",
    # Emptied by the next run; folders of their own would pile up.
    "--basetemp=scratch",
]


# What is answered where every test passes.
PASSED = "passed"
# What is answered of a change of CUDA C++ that is no fault.
UNCOMPILED = "does not compile"
# Audit event of tests/gpu/emulation.py: a test runs a source of CUDA C++, and whether without a change.
LAUNCH = "emulation.launch"
# Whether a test runs the faulty function, whether it is named after the module, and its seconds.
Rank = tuple[bool, bool, float]
FIRST: Rank = (False, False, 0.0)
# How many tests that noticed a fault of a function face the next one before all others do.
REMEMBERED = 3


class Recorder:
    """Pytest plugin: how long every test takes, and which functions of the project its file runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []
        self.codes: dict[str, set[CodeType]] = {}  # by test and by test file
        self.launches: dict[str, set[tuple[str, bool]]] = {}  # likewise
        self.watched: set[CodeType] = set()
        self.heard: set[tuple[str, bool]] = set()
        sys.addaudithook(self.hear)

    @contextlib.contextmanager
    def watching(self, *names: str) -> Iterator[None]:
        """Count what runs meanwhile for these names."""
        self.watched, self.heard = set(), set()
        sys.settrace(self.trace)
        try:
            yield
        finally:
            sys.settrace(None)
            for name in names:
                self.codes.setdefault(name, set()).update(self.watched)
                self.launches.setdefault(name, set()).update(self.heard)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == LAUNCH:
            self.heard.add(arguments)

    def trace(self, frame: Any, event: str, argument: Any) -> None:
        self.watched.add(frame.f_code)

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
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


class FirstFailure:
    """Pytest plugin of a child: those tests first that are likely to fail; the first failure ends it.

    Parameters
    ----------
    answer : int
        File descriptor that the verdict is written to.
    order : dict of str to Rank or None
        When every test comes; None if it is not to run.
    seconds : dict of str to float
        What every test takes without a fault.
    patience : float
        Seconds that a test may take beyond ten times that.
    compiled : bool
        Whether the fault is in a source that tests compile.
    """

    def __init__(
        self,
        answer: int,
        order: dict[str, Rank | None],
        seconds: dict[str, float],
        patience: float,
        compiled: bool,
    ) -> None:
        self.answer = answer
        self.order = order
        self.compiled = compiled
        self.seconds = seconds
        self.patience = patience

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        # Before the tests are imported, which take their settings then. Which example of a failure is
        # the smallest does not matter.
        phases = [p for p in hypothesis.settings().phases if p.name in ("explicit", "generate")]
        hypothesis.settings.register_profile("faults", hypothesis.settings(), phases=phases)
        hypothesis.settings.load_profile("faults")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        ranks = {item: self.order.get(item.nodeid, FIRST) for item in items}
        items[:] = sorted((item for item, rank in ranks.items() if rank is not None), key=ranks.get)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> None:
        if self.compiled and call.excinfo is not None and call.excinfo.errisinstance(SyntaxError):
            self.end(UNCOMPILED)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        signal.setitimer(signal.ITIMER_REAL, self.patience + SLOWER * self.seconds.get(item.nodeid, 0.0))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            self.end(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport

    def end(self, verdict: str) -> None:
        os.write(self.answer, verdict.encode())
        os._exit(0)


class Imports:
    """Which modules of a project import which, functions' own imports included."""

    def __init__(self, root: Path) -> None:
        self.paths = {path: _module(path.relative_to(root)) for path in root.rglob("*.py")}
        self.wanted: dict[str, set[str]] = {}
        self.held: dict[str, set[str]] = {}  # without functions' own imports
        self.compiles: set[str] = set()
        self.starts: set[str] = set()
        known = set(self.paths.values())
        for path, module in self.paths.items():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = _imported(ast.walk(tree))
            if any(name.partition(".")[0] == "numba" for name in names):
                self.compiles.add(module)
            if "subprocess" in names:
                self.starts.add(module)
            for graph, own in ((self.wanted, names), (self.held, _imported(_outside_functions(tree)))):
                own = own | {module.rpartition(".")[0]}
                # A package is imported before any module in it.
                graph[module] = (own | {name.rpartition(".")[0] for name in own}) & known

    def dependents(self, module: str) -> set[str]:
        """A module and all that import it, however indirectly."""
        return _reaching(module, self.wanted)

    def holders(self, module: str) -> set[str]:
        """A module and all that hold what it is when they are loaded, and must be loaded again with it.

        What a function imports is looked up whenever it is called. Modules that cannot be loaded twice,
        as they register something somewhere, stay out of it by this.
        """
        return _reaching(module, self.held)


def _imported(nodes: Iterable[ast.AST]) -> set[str]:
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _outside_functions(child)


def _reaching(module: str, graph: dict[str, set[str]]) -> set[str]:
    found = {module}
    while more := {name for name, wanted in graph.items() if wanted & found} - found:
        found |= more
    return found


class Judge:
    """The tests of a package, passed once without a fault."""

    def __init__(self, patience: float, tests: list[str]) -> None:
        self.patience = patience
        self.root = Path.cwd()
        self.imports = Imports(self.root)
        self.recorder = Recorder()
        started = time.perf_counter()
        code = pytest.main([*OPTIONS, *tests], plugins=[self.recorder])
        self.seconds = time.perf_counter() - started
        self.ready = {"code": int(code), "failed": self.recorder.failed, "seconds": self.seconds}
        self.ran = {
            name: {
                (os.path.relpath(code.co_filename, self.root), code.co_qualname.split(".")[0])
                for code in codes
                if code.co_filename.startswith(f"{self.root}{os.sep}")
            }
            for name, codes in self.recorder.codes.items()
        }
        self.files = sorted({_file(nodeid) for nodeid in self.recorder.seconds})
        self.noticed: dict[tuple[str, str], list[str]] = {}  # by file and function, the latest first
        # Objects that are here to stay are not to be copied into every child by the collector's marks.
        gc.collect()
        gc.freeze()

    def relevant(self, file: str, function: str) -> set[tuple[str, str]]:
        """The functions of which a test must run one to notice a fault in `function`."""
        unit = function.split(".")[0]
        module = _module(Path(file))
        if module in self.imports.compiles:
            # Compiled code leaves no trace: what matters is who calls it.
            callers = self.imports.dependents(module)
            return {one for one in self.called(Path(file).parts[0]) if _module(Path(one[0])) in callers}
        return {(file, unit)}

    def called(self, package: str, name: str | None = None) -> set[tuple[str, str]]:
        """The functions of a package that a test or test file runs, or any of them."""
        ran = self.ran.values() if name is None else [self.ran[name]]
        return {one for ones in ran for one in ones if Path(one[0]).parts[0] == package and one[1][0] != "<"}

    def launching(self, source: str) -> tuple[list[str], dict[str, Rank | None]]:
        """The test files that run a source of CUDA C++ as it is, or a header with any, and their tests.

        Tests that change the source themselves may find no fault for another reason: that they cannot.
        """
        order: dict[str, Rank | None] = {}
        for nodeid, seconds in self.recorder.seconds.items():
            launches = self.recorder.launches[nodeid]
            runs = any(source.endswith(("cuh", name)) for name, _ in launches)
            order[nodeid] = (False, False, seconds) if runs and all(sound for _, sound in launches) else None
        return sorted({_file(nodeid) for nodeid, rank in order.items() if rank is not None}), order

    def selection(self, file: str, function: str) -> tuple[list[str], dict[str, Rank | None]]:
        """The test files that can notice a fault, and the order of their tests.

        A file whose tests never run the package here works on its source, or starts programs of its folder
        that do. Every file is chosen where the fault is in what runs as a module is imported.
        """
        if not file.endswith(".py"):
            return self.launching(Path(file).name)
        relevant = self.relevant(file, function)
        package = Path(file).parts[0]
        dependents = self.imports.dependents(_module(Path(file)))
        chosen = [
            name
            for name in self.files
            if function.startswith("<")
            or self.ran[name] & relevant
            or (not self.called(package, name) and self._reaches(name, dependents))
        ]
        if not any(self.ran[name] & relevant for name in chosen):
            chosen = self.files
        stem = f"test_{Path(file).stem}."
        order: dict[str, Rank | None] = {
            nodeid: (
                not self.ran[nodeid] & relevant,
                stem not in _file(nodeid),
                seconds,
            )
            for nodeid, seconds in self.recorder.seconds.items()
        }
        return chosen, order

    def _reaches(self, name: str, dependents: set[str]) -> bool:
        folder = Path(name).parent
        if _module(Path(name)) not in self.imports.starts:
            return True
        programs = (path for path in self.imports.paths if path.parent == self.root / folder)
        return any(not p.name.startswith("test_") and self.imports.paths[p] in dependents for p in programs)

    def likeliest(
        self, files: list[str], order: dict[str, Rank | None], budget: float
    ) -> dict[str, Rank | None]:
        """An order without the tests that come after so many seconds; the first one always stays."""
        spent, kept = 0.0, dict.fromkeys(order)
        for rank, nodeid in sorted((rank, nodeid) for nodeid, rank in order.items() if rank):
            if _file(nodeid) in files and spent < budget:
                kept[nodeid] = rank
                spent += self.recorder.seconds[nodeid]
        return kept

    def judge(self, file: str, function: str, only: list[str] | None, budget: float | None) -> dict[str, Any]:
        """Who notices the fault that lies in a file now: a test, a "crash", a "hang", or `PASSED`.

        It is `UNCOMPILED` where nobody could. The answer is empty where the tests could not be run at all,
        whatever the fault. `only` names the test files that are to judge, if not all of them are; `budget` is
        how many seconds of tests are, beginning with those that are likely to fail.
        """
        started = time.perf_counter()
        files, order = self.selection(file, function)
        if not files:
            return {"by": "", "seconds": 0.0}
        files = [name for name in files if only is None or name in only]
        if not files:
            return {"by": PASSED, "seconds": 0.0}
        if budget is not None:
            order = self.likeliest(files, order, budget)
        noticed = self.noticed.setdefault((file, function), [])
        likely = {nodeid: rank if nodeid in noticed else None for nodeid, rank in order.items()}
        said = ""
        if remembered := sorted({_file(nodeid) for nodeid in noticed} & set(files)):
            said = self._run(file, remembered, likely)
        if said in ("", PASSED):
            said = self._run(file, files, order)
        if said in order:
            noticed[:] = [said, *(nodeid for nodeid in noticed if nodeid != said)][:REMEMBERED]
        return {"by": said, "seconds": round(time.perf_counter() - started, 2)}

    def _run(self, file: str, files: list[str], order: dict[str, Rank | None]) -> str:
        """What some test files say in a fork, with a fault in `file`; empty if none could be run."""
        reading, writing = os.pipe()
        plugin = FirstFailure(
            writing, order, self.recorder.seconds, self.patience, compiled=not file.endswith(".py")
        )
        child = os.fork()
        if child == 0:
            self._in_child(_module(Path(file)), files, plugin)
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

    def _in_child(self, module: str, files: list[str], plugin: FirstFailure) -> None:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.setitimer(signal.ITIMER_REAL, self.patience + SLOWER * self.seconds)
        verdict = ""
        try:
            stale = self.imports.holders(module)
            for name in list(sys.modules):
                if name in stale or name.partition(".")[0] == "tests":
                    parent, _, child = name.rpartition(".")
                    if parent in sys.modules and hasattr(sys.modules[parent], child):
                        delattr(sys.modules[parent], child)
                    del sys.modules[name]
            code = pytest.main([*OPTIONS, "-x", *files], plugins=[plugin])
            if code == pytest.ExitCode.OK:
                verdict = PASSED
            elif code != pytest.ExitCode.NO_TESTS_COLLECTED:
                verdict = f"pytest ended with {code!r}"
        finally:
            plugin.end(verdict)


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def main(answers: int, patience: float, tests: list[str]) -> None:
    """Pass the tests, say so, and judge what is asked for until there is no more."""
    # What tests print is of no interest here.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    with os.fdopen(answers, "w", encoding="utf-8") as out:

        def say(answer: dict[str, Any]) -> None:
            print(json.dumps(answer), file=out, flush=True)

        judge = Judge(patience, tests)
        say(judge.ready)
        for line in sys.stdin:
            say(judge.judge(**json.loads(line)))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
