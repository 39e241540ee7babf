"""The package as a whole: what it imports, and that its examples hold."""

import ast
import doctest
import importlib
import pkgutil
import sys
from pathlib import Path

import pytest

import reference

MODULES = sorted(["reference", *(f"reference.{m.name}" for m in pkgutil.iter_modules(reference.__path__))])
ALLOWED = {"numpy", "scipy", "reference"} | set(sys.stdlib_module_names)


def source(module):
    return Path(importlib.import_module(module).__file__).read_text(encoding="utf-8")


def test_every_module_of_the_paper_is_there():
    names = {"twn", "atq", "aga", "ssr", "gptq", "ternarize", "packing", "matmul", "baselines", "types"}
    assert {f"reference.{name}" for name in names} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_numpy_scipy_and_the_standard_library(module):
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported = [node.module]
        else:
            continue
        assert {name.split(".")[0] for name in imported} <= ALLOWED


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_hold(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_there_are_examples():
    found = [
        test
        for module in MODULES
        for test in doctest.DocTestFinder().find(importlib.import_module(module))
        if test.examples
    ]
    assert {test.name for test in found} >= {
        "reference.twn.symmetric_ternarize",
        "reference.packing.pack_base3",
        "reference.packing.pack_2bit",
    }
