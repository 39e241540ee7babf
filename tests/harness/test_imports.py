"""Modules of `harness` import only what stands below them, and nothing imports in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import harness

ROOT = Path(harness.__file__).parent

# From the ground up. Rooms of one line know nothing of each other.
STOREYS = [
    {"errors", "plotting", "streams", "words"},
    {"signals"},
    {"files", "cli", "machine", "cpu"},
    {"backends", "distributed", "page", "progress"},
    {"compute"},
    {"models"},
    {"text"},
    {"windows"},
    {"calibration", "runtimes", "ternary"},
    {"perplexity"},
    {"divergence", "hf", "vllm", "zeroshot"},
    {"evaluate", "generate", "inspect", "quantize", "export", "report", "verify"},
    {"comparison"},
    {"architectures", "benchmark", "compare", "hardware", "reproduce", "serve"},
]
PROGRAMS = {*STOREYS[-1], *STOREYS[-3]}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in ROOT.rglob("*.py")}


def imports_of(module: str) -> set[str]:
    """Modules of the package that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inside}
    return {name for name in found if name in MODULES} - {module}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_its_storey() -> None:
    rooms = {room(module) for module in MODULES if module != "harness"}
    assert rooms == set().union(*STOREYS)


def test_imports_only_go_down() -> None:
    height = {name: level for level, rooms in enumerate(STOREYS) for name in rooms}
    upward = [
        f"{module} imports {other}"
        for module in MODULES
        if module != "harness"  # `harness.load` is a door from the street to the roof
        for other in imports_of(module) - {"harness"}
        if room(module) != room(other) and height[room(other)] >= height[room(module)]
    ]
    assert not upward


def test_no_imports_go_in_a_circle() -> None:
    graph = {module: imports_of(module) for module in MODULES if module != "harness"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None


def test_only_programs_are_command_lines() -> None:
    users = {room(module) for module in MODULES if "harness.cli" in imports_of(module)}
    assert users <= PROGRAMS
