"""The planter of faults, the judge of a small project, and the committed outcome."""

from __future__ import annotations

import ast
import json
import warnings
from textwrap import dedent

import pytest

from tests.faults import outcome
from tests.faults.__main__ import FailingTests, Project, judge_files, main
from tests.faults.fault import MODULE_LEVEL
from tests.faults.outcome import Journal, OutcomeError, Verdict
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


def test_what_no_test_notices_survives_and_nothing_is_judged_twice(project, tmp_path):
    journal = tmp_path / "journal.jsonl"
    before = (tmp_path / "toy/sums.py").read_text()
    _, judged = judge_files(project, project.sources(), Journal(journal, tmp_path), resume=False)
    verdicts = {verdict.fault.change: verdict.by for verdict in judged.verdicts}
    assert (tmp_path / "toy/sums.py").read_text() == before
    assert verdicts["return x + x → return (x - x)"] == "tests/toy/test_sums.py::test_double"
    assert verdicts["while x > 5: → while True:"] == "hang"
    assert verdicts["while x > 5: → while (x < 5):"] == "hang"
    survivors = {change for change, by in verdicts.items() if by is None}
    assert {"while x > 5: → while (x >= 5):", "x -= 1 → pass", "while x > 5: → while False:"} <= survivors
    assert not any("return" in change for change in survivors)

    # What was cut off as it was written does not count; the rest holds, and needs no process.
    with journal.open("a") as file:
        file.write('{"fault": ["toy/sums')
    again = judge_files(
        Project(tmp_path, project.tests, ()), project.sources(), Journal(journal, tmp_path), resume=True
    )
    assert list(again)[1] == judged
    # Another test may notice what survived the others.
    known = Journal(journal, tmp_path)
    more = {**project.hashes("toy"), "tests/toy/test_more.py": "new"}
    shared = {**project.hashes("toy"), "tests/toy/conftest.py": "new"}
    for verdict in judged.verdicts:
        if verdict.by is None:
            assert known.find(verdict.fault, more) == (None, ["tests/toy/test_more.py"])
            assert known.find(verdict.fault, shared) == (None, None)
        elif verdict.by != "hang":
            assert known.find(verdict.fault, more) == (verdict, None)
        assert known.find(verdict.fault, {**more, "toy/sums.py": "changed"}) == (None, None)
    # A test that failed counts as long as it is the same, whatever other tests its file has.
    caught_by_double = next(v for v in judged.verdicts if v.by and v.by.endswith("test_double"))
    file = tmp_path / "tests/toy/test_sums.py"
    for text, same in {
        TOY_TESTS.replace("hidden(4) == 4", "hidden(3) == 3"): True,
        TOY_TESTS.replace("double(3) == 6", "double(2) == 4"): False,
        TOY_TESTS.replace("import double,", "import double as double,"): False,
        TOY_TESTS: True,
    }.items():
        file.write_text(text)
        assert known.find(caught_by_double.fault, project.hashes("toy"))[0] == (
            caught_by_double if same else None
        )
    (tmp_path / "tests/toy/test_more.py").write_text(
        "from toy.sums import hidden\n\n\ndef test_more():\n    assert hidden(7) == 5\n"
    )
    _, third = judge_files(project, project.sources(), known, resume=True)
    caught = {verdict.fault.change: verdict.by for verdict in third.verdicts}
    assert caught["x -= 1 → pass"] == "hang"
    assert caught["while x > 5: → while (x >= 5):"] == "tests/toy/test_more.py::test_more"
    assert [caught[change] for change in verdicts if verdicts[change]] == [
        by for by in verdicts.values() if by
    ]


def test_what_imports_the_faulty_module_only_in_functions_is_loaded_once(project, tmp_path):
    (tmp_path / "toy/once.py").write_text(
        "import sys\n\nassert not hasattr(sys, 'loaded_once')\nsys.loaded_once = True\n\n\n"
        "def doubled(x):\n    from toy.sums import double\n\n    return double(x)\n"
    )
    (tmp_path / "tests/toy/test_once.py").write_text(
        "from toy.once import doubled\n\n\ndef test_once():\n    assert doubled(5) == 10\n"
    )
    (tmp_path / "tests/toy/test_sums.py").write_text(TOY_TESTS.replace("double(3)", "2 * 3"))
    judged = judge_files(
        project, ["toy/sums.py"], Journal(tmp_path / "journal.jsonl", tmp_path), resume=False
    )
    verdicts = {verdict.fault.change: verdict.by for one in judged for verdict in one.verdicts}
    assert verdicts["return x + x → return (x - x)"] == "tests/toy/test_once.py::test_once"
    assert verdicts["while x > 5: → while False:"] is None


def test_a_fault_that_has_a_reason_faces_the_likely_tests_alone(project, tmp_path):
    (tmp_path / "tests/toy/test_sums.py").write_text(
        "import time\n"
        + TOY_TESTS.replace("double(3) == 6", "double(3) != 5")
        + "\n\ndef test_slowly():\n    time.sleep(0.5)\n    assert double(3) == 6\n"
    )
    project.brief = 0.001
    change, journal = "return x + x → return (x - x)", tmp_path / "journal.jsonl"
    key = "toy/sums.py", "double", change

    def judged(explained):
        files = judge_files(
            project, ["toy/sums.py"], Journal(journal, tmp_path), resume=True, explained=explained
        )
        return {verdict.fault.change: verdict.by for one in files for verdict in one.verdicts}[change]

    assert judged({key}) is None
    assert judged({key}) is None
    # The reason is gone, and so is what rested on it.
    assert judged(()) == "tests/toy/test_sums.py::test_slowly"


def test_tests_that_fail_without_a_fault_judge_nothing(project, tmp_path):
    (tmp_path / "tests/toy/test_sums.py").write_text("def test_wrong():\n    assert False\n")
    with pytest.raises(FailingTests, match=r"fail without a fault: tests/toy/test_sums\.py::test_wrong"):
        list(
            judge_files(
                project, project.sources(), Journal(tmp_path / "journal.jsonl", tmp_path), resume=False
            )
        )


def test_reasons_are_kept_by_what_the_fault_is(tmp_path):
    faults = find_faults("\n\ndef f(x):\n    return x + 1\n", "a.py")
    verdicts = [Verdict(fault, None if fault.kind == "operator" else "a test") for fault in faults]
    file = tmp_path / "survivors.toml"
    survivors = [verdict for verdict in verdicts if verdict.by is None]
    file.write_text(outcome.as_reasons(survivors))
    with pytest.raises(OutcomeError, match="has no reason"):
        outcome.load_reasons(file)
    file.write_text(outcome.as_reasons(survivors).replace('reason = ""', 'reason = "x is 0"'))
    reasons = outcome.load_reasons(file)
    assert reasons == {("a.py", "f", "return x + 1 → return (x - 1)"): "x is 0"}
    record = tmp_path / "outcome.json"
    outcome.write_outcome(record, "a.py", "abc", verdicts, reasons, ["a.py"])
    (survivor,) = outcome.load_outcome(record)["a.py"]["survivors"]
    assert (survivor["line"], survivor["reason"]) == (4, "x is 0")
    file.write_text(file.read_text() * 2)
    with pytest.raises(OutcomeError, match="or two"):
        outcome.load_reasons(file)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format_version": 2, "files": {}}',
        '{"format_version": 1, "files": {"a.py": {}}}',
        '{"format_version": 1, "files": {"a.py": {"sha256": "", "faults": {"sign": 2}, "caught": 1, '
        '"survivors": []}}}',
    ],
)
def test_a_malformed_outcome_is_an_error(tmp_path, content):
    file = tmp_path / "outcome.json"
    file.write_text(content)
    with pytest.raises(OutcomeError, match=r"outcome\.json"):
        outcome.load_outcome(file)


def test_every_survivor_that_is_recorded_has_a_reason():
    outcome.load_reasons()
    for name, entry in outcome.load_outcome().items():
        assert [survivor["fault"] for survivor in entry["survivors"] if not survivor["reason"]] == [], name


def test_where_no_faults_were_planted_since_it_changed_is_reported():
    project = Project()
    changed = outcome.changed_since(outcome.OUTCOME, project.root, project.sources())
    if changed:
        warnings.warn(f"no faults planted in these as they are: {', '.join(changed)}", stacklevel=1)


def test_the_command_lists_what_it_would_plant(capsys):
    assert main(["--file", "reference/twn.py", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "reference/twn.py:12 <module>: THRESHOLD = 0.75 → THRESHOLD = 0.7575" in lines
    with pytest.raises(SystemExit):
        main(["--file", "reference/nothing.py"])
    assert "no such source: reference/nothing.py" in capsys.readouterr().err


def test_the_outcome_is_as_it_is_written():
    text = outcome.OUTCOME.read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"
