"""The backend mirrors the reference, and computes nothing with it."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import gpu
from gpu.twin import twin
from harness.backends import load_backend
from harness.verify.tolerances import TOLERANCES
from reference.twn import symmetric_ternarize

SOURCES = sorted(Path(gpu.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_only_types_and_constants_come_from_the_reference(source):
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported = {alias.name.split(".")[0] for alias in node.names}
            assert not imported & {"reference", "harness"}
            assert "importlib" not in imported or source.stem == "twin"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            package = node.module.split(".")[0]
            assert package not in ("harness", "importlib")
            if package == "reference":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    taken = getattr(module, alias.name)
                    assert inspect.isclass(taken) or isinstance(taken, int | float | str), alias.name


def test_every_operation_is_there_or_refused():
    assert load_backend("gpu").operations.keys() | gpu.REFUSED >= TOLERANCES.keys() >= gpu.REFUSED


def test_every_operation_is_documented_by_its_twin():
    reference = load_backend("reference").operations
    for operation, function in load_backend("gpu").operations.items():
        whole, _, _ = inspect.getdoc(reference[operation]).partition("\n\nExamples\n")
        assert inspect.getdoc(function).startswith(whole.replace("array_like", "device array")), operation


def function_named(name, module="gpu.twn"):
    """Sets where a function is said to be from."""

    def name_it(function):
        function.__name__, function.__module__ = name, module
        return function

    return name_it


def test_a_twin_takes_the_docstring_and_adds_what_differs():
    @twin
    @function_named("symmetric_ternarize")
    def noted(W):
        """Only here."""

    @twin
    @function_named("symmetric_ternarize")
    def without_note(W):
        pass

    @twin
    @function_named("permute", "gpu.ssr")
    def first_note(A, permutation):
        """Only here."""

    assert noted.__doc__.startswith("Approximate each row of W by ``alpha * T`` (Eq. 1-3).\n\nParameters\n")
    assert "|T_{ij}|`.\n\nOnly here.\n\nExamples\n--------\n>>> " in noted.__doc__
    assert "W : (n, m) device array\n    Weights." in noted.__doc__
    assert noted.__doc__.replace("Only here.\n\n", "") == without_note.__doc__
    assert first_note.__doc__.endswith("not one of its columns.\n\nNotes\n-----\nOnly here.")


def test_without_docstrings_there_is_none_to_take(monkeypatch):
    monkeypatch.setattr(symmetric_ternarize, "__doc__", None)

    @twin
    @function_named("symmetric_ternarize")
    def bare(W):
        pass

    assert bare.__doc__ is None


def test_another_signature_than_the_twin_s_is_refused():
    @function_named("flexible_round", "gpu.atq")
    def other_name(W, alpha, shift):
        pass

    @function_named("iterative_ternary_fitting", "gpu.atq")
    def other_default(W, max_iterations=99, start=None):
        pass

    @function_named("symmetric_ternarize")
    def other_kind(*, W):
        pass

    for function in (other_name, other_default, other_kind):
        with pytest.raises(TypeError, match=rf"gpu\..*{function.__name__}\(.*\) differs from its twin's \("):
            twin(function)


def test_a_function_without_a_twin_is_refused():
    @function_named("nothing")
    def alone(W):
        pass

    with pytest.raises(AttributeError, match=r"reference\.twn.*nothing"):
        twin(alone)
