"""The backend mirrors the reference, and computes nothing with it."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import gpu
from harness.verify.tolerances import TOLERANCES

SOURCES = sorted(Path(gpu.__file__).parent.rglob("*.py"))
OPERATIONS = [operation for operation in TOLERANCES if operation not in gpu.REFUSED]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_only_types_and_constants_come_from_the_reference(source):
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] in ("reference", "harness") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            package = node.module.split(".")[0]
            assert package != "harness"
            if package == "reference":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    taken = getattr(module, alias.name)
                    assert inspect.isclass(taken) or isinstance(taken, int | float | str), alias.name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_signature_is_that_of_the_reference(operation):
    module, name = operation.split(".")
    ours = inspect.signature(getattr(importlib.import_module(f"gpu.{module}"), name))
    theirs = inspect.signature(getattr(importlib.import_module(f"reference.{module}"), name))
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]


def test_what_is_refused_is_known():
    assert set(TOLERANCES) >= gpu.REFUSED
