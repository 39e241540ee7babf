"""The planter of faults, the judge of a small project, and the reasons for survivors."""

from __future__ import annotations

import ast
import json
import subprocess
from textwrap import dedent

import pytest

from tests.faults import __main__ as program
from tests.faults import outcome
from tests.faults.__main__ import Project, Unjudged, judge, main
from tests.faults.fault import MODULE_LEVEL
from tests.faults.judge import PASSED
from tests.faults.outcome import ReasonsError
from tests.faults.plant import find_faults

SAMPLE = dedent(
    '''
    """A docstring is left alone: 1 + 1."""
    import numpy as np

    __all__ = ["sample"]
    LIMIT: float = 1e-6


    def sample(x, W, lane, lanes=32):
        """And here: a < b."""
        if x < 0 and not lane:
            raise ValueError(f"{x + 1} is below 0")
        for j in range(lane, W.shape[1], lanes):
            cuda.syncthreads()
            W[j] -= 2 * x
        order = np.argsort(-x, kind="stable")[:lane]
        return W.T @ x, order.astype(np.int8, copy=False).sum(axis=0)
    '''
)
EXPECTED = {
    "constant": {"LIMIT: float = 1e-6 → LIMIT: float = 1e-05", "LIMIT: float = 1e-6 → LIMIT: float = 1e-07"},
    "boolean": {"if x < 0 and not lane: → if (x < 0 or not lane):"},
    "condition": {"if x < 0 and not lane: → if False:"},
    "comparison": {
        "if x < 0 and not lane: → if (x <= 0) and not lane:",
        "if x < 0 and not lane: → if (x > 0) and not lane:",
    },
    "not": {"if x < 0 and not lane: → if x < 0 and lane:"},
    "index": {
        "for j in range(lane, W.shape[1], lanes): → for j in range((lane + 1), W.shape[1], lanes):",
        "for j in range(lane, W.shape[1], lanes): → for j in range(lane, (W.shape[1] - 1), lanes):",
        "W[j] -= 2 * x → W[(j + 1)] -= 2 * x",
        '…p.argsort(-x, kind="stable")[:lane] → …p.argsort(-x, kind="stable")[:(lane - 1)]',
    },
    "statement": {"cuda.syncthreads() → pass", "W[j] -= 2 * x → pass"},
    "operator": {
        "W[j] -= 2 * x → W[j] = 2 * x",
        "W[j] -= 2 * x → W[j] += 2 * x",
        "W[j] -= 2 * x → W[j] -= (2 / x)",
    },
    "sign": {'order = np.argsort(-x, kind="stable")[:lane] → order = np.argsort(x, kind="stable")[:lane]'},
    "tie": {
        'order = np.argsort(-x, kind="stable")[:lane] → '
        "order = (len(-x) - 1 - np.argsort((-x)[::-1], kind='stable'))[:lane]"
    },
    "transpose": {"return W.T @ x, order.astype(np.int8, co… → return W @ x, order.astype(np.int8, co…"},
    "type": {
        "…turn W.T @ x, order.astype(np.int8, copy=False).sum(axis=0) → "
        "…turn W.T @ x, order.astype(np.uint8, copy=False).sum(axis=0)"
    },
    "axis": {"…np.int8, copy=False).sum(axis=0) → …np.int8, copy=False).sum(axis=1)"},
    "term": {"W[j] -= 2 * x → W[j] -= x", "if x < 0 and not lane: → if (not lane):"},
}


def test_faults_of_every_kind_are_planted():
    changes = {}
    for fault in find_faults(SAMPLE, "sample.py"):
        changes.setdefault(fault.kind, set()).add(fault.change)
        assert fault.line == SAMPLE.encode()[: fault.start].count(b"\n") + 1
        assert fault.function == (MODULE_LEVEL if fault.line < 8 else "sample")
    for kind, expected in EXPECTED.items():
        assert changes[kind] >= expected, kind


def test_texts_and_what_asks_for_speed_are_left_alone():
    for fault in find_faults(SAMPLE, "sample.py"):
        assert not any(
            text in fault.change for text in ("docstring", "And here", "import", "__all__", "below")
        )
        assert "copy=True" not in fault.change


PYTHON = [name for name in Project().sources() if name.endswith(".py") and not name.endswith("__init__.py")]


@pytest.mark.parametrize("file", PYTHON)
def test_a_fault_is_one_change_of_a_file_that_parses(file):
    source = (Project().root / file).read_text(encoding="utf-8")
    faults = find_faults(source, file)
    assert len({fault.key for fault in faults}) == len(faults) > 0
    for fault in faults[::25]:
        planted = fault.planted(source)
        assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source))
        assert planted.encode()[: fault.start] == source.encode()[: fault.start]


TOY = """\
def double(x):
    return x + x


def hidden(x):
    while x > 5:
        x -= 1
    return x
"""
TOY_TESTS = """\
from toy.sums import double, hidden


def test_double():
    assert double(3) == 6


def test_hidden():
    assert hidden(4) == 4
"""
TOY_SETTINGS = """\
[tool.pytest.ini_options]
pythonpath = ["."]
addopts = "--import-mode=importlib"
"""


@pytest.fixture
def project(tmp_path):
    """A package of two functions, one of which is hardly tested."""
    for name, text in {
        "toy/__init__.py": "",
        "toy/sums.py": TOY,
        "tests/__init__.py": "",
        "tests/toy/test_sums.py": TOY_TESTS,
        "pyproject.toml": TOY_SETTINGS,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return Project(tmp_path, {"toy": ("tests/toy",)}, ("toy", "tests", "pyproject.toml"), patience=0.2)


def judged(project, explained=(), text=""):
    faults = [fault for fault in project.faults("toy/sums.py") if text in fault.change]
    return {verdict.fault.change: verdict.by for verdict in judge(project, "toy", faults, explained)}


def test_what_no_test_notices_survives(project, tmp_path):
    before = (tmp_path / "toy/sums.py").read_text()
    verdicts = judged(project)
    assert (tmp_path / "toy/sums.py").read_text() == before
    assert verdicts["return x + x → return (x - x)"] == "tests/toy/test_sums.py::test_double"
    assert verdicts["while x > 5: → while True:"] == "hang"
    assert verdicts["while x > 5: → while (x < 5):"] == "hang"
    survivors = {change for change, by in verdicts.items() if by == PASSED}
    assert {"while x > 5: → while (x >= 5):", "x -= 1 → pass", "while x > 5: → while False:"} <= survivors
    assert not any("return" in change for change in survivors)


def test_what_imports_the_faulty_module_only_in_functions_is_loaded_once(project, tmp_path):
    (tmp_path / "toy/once.py").write_text(
        "import sys\n\nassert not hasattr(sys, 'loaded_once')\nsys.loaded_once = True\n\n\n"
        "def doubled(x):\n    from toy.sums import double\n\n    return double(x)\n"
    )
    (tmp_path / "tests/toy/test_once.py").write_text(
        "from toy.once import doubled\n\n\ndef test_once():\n    assert doubled(5) == 10\n"
    )
    (tmp_path / "tests/toy/test_sums.py").write_text(TOY_TESTS.replace("double(3)", "2 * 3"))
    verdicts = judged(project)
    assert verdicts["return x + x → return (x - x)"] == "tests/toy/test_once.py::test_once"
    assert verdicts["while x > 5: → while False:"] == PASSED


def test_a_fault_that_has_a_reason_faces_the_likely_tests_alone(project, tmp_path):
    (tmp_path / "tests/toy/test_sums.py").write_text(
        "import time\n"
        + TOY_TESTS.replace("assert double(3) == 6", "time.sleep(0.1)\n    assert double(3) != 5")
        + "\n\ndef test_slowly():\n    time.sleep(0.3)\n    assert double(3) == 6\n"
    )
    project.brief = 0.05  # which the tests before the slow one exceed on any machine
    change = "return x + x → return (x - x)"
    assert judged(project, {("toy/sums.py", "double", change)}, change)[change] == PASSED
    assert judged(project, text=change)[change] == "tests/toy/test_sums.py::test_slowly"


def test_tests_that_fail_without_a_fault_judge_nothing(project, tmp_path):
    (tmp_path / "tests/toy/test_sums.py").write_text("def test_wrong():\n    assert False\n")
    with pytest.raises(Unjudged, match=r"fail without a fault: tests/toy/test_sums\.py::test_wrong"):
        judged(project)


def test_tests_that_fail_as_a_file_is_loaded_again_judge_nothing(project, tmp_path):
    (tmp_path / "tests/toy/test_sums.py").write_text(
        "import sys\n\nfrom toy.sums import double\n\n\ndef test_once():\n    assert double(1) == 2\n"
        "    assert not hasattr(sys, 'seen')\n    sys.seen = True\n"
    )
    with pytest.raises(Unjudged, match=r"toy/sums\.py has no fault, but fails .*::test_once"):
        judged(project)


def test_a_run_says_what_survives_and_what_has_no_reason(project, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outcome, "VERDICTS", tmp_path / "outcome.jsonl")
    faults = [
        fault
        for fault in project.faults("toy/sums.py")
        if fault.change in ("x -= 1 → pass", "x -= 1 → x = 1")
    ]
    caught = next(fault for fault in project.faults("toy/sums.py") if fault.function == "double")
    reasons = {faults[0].key: "a reason", caught.key: "another"}
    monkeypatch.setattr(outcome, "load_reasons", lambda: reasons)
    assert program.run(project, [caught, *faults]) == 1
    out = capsys.readouterr().out
    assert "toy/sums.py: 3 faults, 2 survive, 1 of them explained" in out
    assert "survivors.toml has a reason, but tests/toy/test_sums.py::test_double detects" in out
    assert out.endswith(outcome.as_reasons([faults[1]]) + "\n")
    lines = [json.loads(line) for line in outcome.VERDICTS.read_text().splitlines()]
    assert [line["by"] for line in lines] == ["tests/toy/test_sums.py::test_double", PASSED, PASSED]
    reasons[faults[1].key] = "a third"
    assert program.run(project, faults) == 0


def test_since_a_commit_are_faults_of_the_functions_and_lines_that_differ(project, tmp_path):
    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    file = tmp_path / "toy/sums.py"
    file.write_text("LIMIT = 3\n\n\n" + TOY)
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    # No fault lies in a comment.
    file.write_text(
        file.read_text()
        .replace("        x -= 1\n", "        x = 0\n        x = 5\n")
        .replace("return x + x", "return x + x  #")
    )
    (tmp_path / "toy/new.py").write_text("A = 1\n")

    def chosen():
        changed = project.changed("HEAD")
        return {
            fault.function if fault.function != MODULE_LEVEL else fault.change
            for name in changed
            for fault in project.faults(name)
            if fault.concerns(changed[name])
        }

    assert chosen() == {"double", "hidden", "A = 1 → A = 2", "A = 1 → A = 0"}
    git("add", ".")
    git("commit", "-m", "second")
    assert chosen() == set()
    file.write_text(file.read_text().replace("        x = 5\n", ""))
    assert chosen() == {"hidden"}
    file.write_text(file.read_text().replace("        x = 0\n", "        x = 0\n        x = 5\n"))
    file.write_text(file.read_text().replace("LIMIT = 3", "LIMIT = 4"))
    assert chosen() == {"LIMIT = 4 → LIMIT = 5", "LIMIT = 4 → LIMIT = 3"}
    with pytest.raises(Unjudged, match="nothing"):
        project.changed("nothing")


def test_reasons_are_kept_by_what_the_fault_is(tmp_path):
    faults = find_faults("\n\ndef f(x):\n    return x + 1\n", "a.py")
    text = outcome.as_reasons([fault for fault in faults if fault.kind == "operator"])
    file = tmp_path / "survivors.toml"
    file.write_text(text)
    with pytest.raises(ReasonsError, match="has no reason"):
        outcome.load_reasons(file)
    file.write_text(text.replace('reason = ""', 'reason = "x is 0"'))
    assert outcome.load_reasons(file) == {("a.py", "f", "return x + 1 → return (x - 1)"): "x is 0"}
    file.write_text(file.read_text() * 2)
    with pytest.raises(ReasonsError, match="or two"):
        outcome.load_reasons(file)


def test_every_fault_that_is_explained_can_be_planted():
    project = Project()
    reasons = outcome.load_reasons()
    sources = set(project.sources()) & {file for file, _, _ in reasons}
    assert reasons.keys() - {fault.key for file in sources for fault in project.faults(file)} == set()


def test_the_command_lists_what_it_would_plant(capsys):
    assert main(["--file", "reference/twn.py", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "reference/twn.py:12 <module>: THRESHOLD = 0.75 → THRESHOLD = 0.7575" in lines
    with pytest.raises(SystemExit):
        main(["--file", "reference/nothing.py"])
    assert "no such source: reference/nothing.py" in capsys.readouterr().err
