"""Messages count in English, and the help shows defaults as one types them."""

from __future__ import annotations

import argparse
import re

import pytest

from harness.benchmark import options as benchmark
from harness.cli import HelpFormatter
from harness.evaluate import parser as evaluate_parser
from harness.quantize.__main__ import parser as quantize_parser
from harness.reproduce.__main__ import parser as reproduce_parser
from harness.words import counted


@pytest.mark.parametrize(
    ("number", "noun", "form", "words"),
    [
        (0, "window", "", "0 windows"),
        (1, "window", "", "1 window"),
        (2, "window", "", "2 windows"),
        (1, "matrix", ",", "1 matrix"),
        (1234, "matrix", ",", "1,234 matrices"),
        (1234, "ternary layer", "", "1234 ternary layers"),
    ],
)
def test_a_noun_agrees_with_its_number(number: int, noun: str, form: str, words: str) -> None:
    assert counted(number, noun, form) == words


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Command lines with all kinds of defaults, and those of the benchmarks, which have many."""
    found = {"quantize": quantize_parser(), "evaluate": evaluate_parser(), "reproduce": reproduce_parser()}
    whole = benchmark.parser()
    (kinds,) = (action for action in whole._actions if isinstance(action.choices, dict))
    return {**found, **{f"benchmark {name}": sub for name, sub in (kinds.choices or {}).items()}}


@pytest.mark.parametrize("name", parsers())
def test_no_default_is_shown_as_python_has_it(name: str) -> None:
    shown = re.sub(r"\s+", " ", parsers()[name].format_help())
    for default in re.findall(r"\(default: (.*?)\)(?= |$)", shown):
        assert default
        assert not re.search(r"[\[\]{}'\"]|None|True|False|Path", default)


def test_a_list_is_shown_as_its_words() -> None:
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--text", nargs="+", default=["a", "b.txt"], help="texts")
    parser.add_argument("--size", nargs="+", type=int, default=[1, 16], help="sizes")
    parser.add_argument("--none", action="append", default=[], help="nothing")
    shown = parser.format_help()
    assert "texts (default: a b.txt)\n" in shown
    assert "sizes (default: 1 16)\n" in shown
    assert "nothing\n" in shown
