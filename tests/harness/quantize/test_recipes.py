"""Recipes: what their switches are, and that the best one is better, resumes and streams like the paper's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import harness
from harness.cli import EXIT_USAGE
from harness.divergence import divergence
from harness.models.folder import REPORT
from harness.quantize.__main__ import main as quantize_main
from harness.quantize.__main__ import parser
from harness.quantize.options import Options, from_arguments
from reference.types import BEST, TernaryConfig
from tests.harness import tiny
from tests.harness.conftest import SMALL

Run = Callable[..., int]


def options(*arguments: str) -> Options:
    return from_arguments(parser().parse_args(list(arguments)))


def steps(found: Options) -> tuple[Any, ...]:
    return found.config, found.targets, found.token_weights, found.true_sequential


def test_best_is_the_default_and_the_paper_is_one_word_away() -> None:
    best = (replace(BEST, block_size=64, grid="int8"), "stream", True, True)
    assert steps(options()) == steps(options("--recipe", "best")) == best
    paper = (TernaryConfig(), "weights", False, False)
    assert steps(options("--recipe", "paper")) == steps(Options()) == paper
    # A baseline is what its own paper says, unless the user asks for more.
    assert steps(options("--method", "gptq-2bit")) == paper
    assert steps(options("--method", "gptq-2bit", "--recipe", "best"))[1] == "stream"


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (("--targets", "outputs"), {"targets": "outputs"}),
        (("--no-token-weights",), {"token_weights": False}),
        (("--no-sequential",), {"true_sequential": False}),
        (("--no-true-sequential",), {"true_sequential": False}),
        (("--order", "ssr"), {"config": {"reorder": "ssr"}}),
        (("--reorder", "ssr"), {"config": {"reorder": "ssr"}}),
        (("--no-descent",), {"config": {"refinement": "grid"}}),
        (("--no-joint-grid",), {"config": {"refinement": "none"}}),
        (("--no-feed-forward",), {"config": {"feed_forward": False}}),
        (("--damping", "0.3"), {"config": {"damping": 0.3}}),
        (("--strength", "0.5"), {"strength": 0.5}),
    ],
)
def test_every_step_has_its_own_switch(flags: tuple[str, ...], changed: dict[str, Any]) -> None:
    expected = options()
    if "config" in changed:
        changed = {"config": replace(expected.config, **changed["config"])}
    assert options(*flags) == replace(expected, **changed)


def test_descent_without_the_joint_grid_is_refused(run_main: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(quantize_main, "--descent", "--no-joint-grid") == EXIT_USAGE
    assert "alternates with the joint grid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--recipe paper --strength 0.5", "--strength has no effect with --targets weights"),
        ("--targets outputs --token-weights", "--token-weights has no effect with --targets outputs"),
        ("--no-joint-grid --rounds 2", "--rounds has no effect with --no-joint-grid"),
        ("--method rtn-2bit --damping 0.2", "--damping has no effect with --method rtn-2bit"),
        ("--method gptq-2bit --feed-forward", "--feed-forward has no effect with --method gptq-2bit"),
        ("--method gptq-2bit --no-descent", "--no-descent has no effect with --method gptq-2bit"),
        ("--method gptq-2bit --foldable", "--foldable has no effect with --method gptq-2bit"),
        ("--no-descent --rounds 2", "--rounds has no effect with --no-descent; drop one of them"),
        (
            "--recipe paper --rounds 2",
            "--rounds has no effect with --no-descent, which recipe paper has; drop it, or give --descent",
        ),
        ("--no-itf --max-iterations 9", "--max-iterations has no effect with --no-itf; drop one of them"),
        ("--start twn --shift none", "--start twn has no effect with --shift none; drop one of them"),
        ("--eval none --eval-windows 3", "--eval-windows has no effect with --eval none; drop one of them"),
        ("--recipe paper --token-weights", "--targets weights, which recipe paper has"),
        ("--recipe paper --strength 1", "--strength has no effect with --targets weights, which recipe"),
        ("--method rtn-2bit --rounds 2", "--rounds has no effect with --method rtn-2bit; drop one of them"),
        ("--eval none --eval-seqlen 2048", "--eval-seqlen has no effect with --eval none; drop one of them"),
        (
            "--calibration my.txt --eval-seqlen 64",
            "--eval-seqlen has no effect with --eval none, the default with this text; drop it, or",
        ),
        ("--calibration c4:c4.json --eval-windows 4", "--eval-windows has no effect with --eval none, the"),
        ("some/folder --gguf-dtype float16", "--gguf-dtype has no effect without a .gguf file; drop it"),
    ],
)
def test_a_switch_that_would_change_nothing_is_refused(
    flags: str, words: str, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(quantize_main, *flags.split()) == EXIT_USAGE
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        "--calibration my.txt --eval-seqlen 64 --eval ptb",
        "--calibration c4 --eval-windows 4",
        "--eval-windows 4",
        "--gguf-dtype float16",
        "model.GGUF --gguf-dtype bfloat16",
        "--strength 0 --token-weights",  # the weights count in the Gram matrix as well
    ],
)
def test_a_switch_that_changes_something_is_not(flags: str) -> None:
    assert options(*flags.split())


@pytest.mark.parametrize("flags", ["--damping 0.2 --block-size 64", "--recipe best --strength 0.5"])
def test_a_baseline_takes_the_switches_that_change_it(flags: str) -> None:
    assert options("--method", "gptq-2bit", *flags.split()).method == "gptq-2bit"


@pytest.mark.parametrize("strength", ["1.5", "-0.1", "much"])
def test_a_strength_that_is_no_share_is_refused(
    strength: str, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(quantize_main, "--strength", strength) == EXIT_USAGE
    assert "--strength" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model off any ternary grid."""
    return tiny.save(tiny.make_model("llama", torch.float32, ternary=False), tmp_path_factory.mktemp("model"))


def test_best_is_nearer_to_the_original_than_the_paper(
    model: Path, words_file: Path, tmp_path: Path, run_main: Run
) -> None:
    found = {}
    windows = torch.randint(3, tiny.VOCABULARY, (8, 48), generator=torch.Generator().manual_seed(7))
    original = tiny.make_model("llama", torch.float32, ternary=False)
    for recipe, backend in (("paper", "reference"), ("best", "reference"), ("best", "cpu")):
        out = tmp_path / f"{recipe}-{backend}"
        where = (model, "--out", out, "--calibration", words_file, *SMALL, "--nsamples", "24")
        assert run_main(quantize_main, *where, "--recipe", recipe, "--backend", backend) == 0
        found[recipe, backend] = divergence(original, harness.load(out), windows)[1].mean
        report = json.loads((out / REPORT).read_text())
        assert report["options"]["recipe"] == recipe
        assert report["calibration"]["targets"] == ("stream" if recipe == "best" else "weights")
        assert report["config"]["refinement"] == ("descent" if recipe == "best" else "none")
    assert found["best", "reference"] < 0.8 * found["paper", "reference"]
    # Both backends round alike but for ties, which one float32 product could break.
    assert found["best", "cpu"] == pytest.approx(found["best", "reference"], rel=0.05)
