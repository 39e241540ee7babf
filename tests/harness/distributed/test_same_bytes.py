"""Any number of processes gives the same bytes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from harness import text
from harness.benchmark.ranks import layer_bytes
from harness.benchmark.shapes import Shape
from harness.compute import default_compute
from harness.distributed.ranks import Ranks
from harness.divergence import divergence_on
from harness.files import read_json, write_json
from harness.models.decoder import locate_layers
from harness.models.folder import REPORT
from harness.models.loading import load_original
from harness.perplexity import measure_by_layers, measure_on
from harness.quantize.options import RECIPES, STREAM, Options
from harness.quantize.run import quantize
from harness.windows import evaluation_windows, tokenize
from tests.harness import tiny
from tests.harness.distributed.processes import in_processes
from tests.harness.quantize.stopping import files_of

Folders = dict[str, Path]

BASELINE = "gptq-2bit"
# Model and recipe; a baseline; and a model whose layers are read from disk.
CASES = {
    "dense-best": ("qwen3", "best"),
    "dense-paper": ("qwen3", "paper"),
    "mixture-best": ("mixtral", "best"),
    "mixture-paper": ("mixtral", "paper"),
    BASELINE: ("qwen3", "paper"),
    "from-disk": ("qwen3", "best"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("models")
    return {
        "qwen3": tiny.save(tiny.make_model("qwen3", ternary=False), folder / "qwen3"),
        "mixtral": tiny.save(tiny.make_mixture("mixtral", ternary=False), folder / "mixtral"),
    }


def quantize_all(models: Folders, words: Path, out: Path) -> None:
    """Quantize every case into a folder of its name."""
    for name, (model, recipe) in CASES.items():
        settings = RECIPES[recipe]
        options = Options(
            model=str(models[model]),
            out=out / name,
            backend="cpu",
            calibration=str(words),
            evaluation=str(words),
            evaluation_seqlen=24,
            evaluation_windows=5,
            nsamples=11,  # in shards that no number of processes divides
            seqlen=24,
            recipe=recipe,
            config=settings.config,
            targets=settings.targets,
            token_weights=settings.token_weights,
            true_sequential=settings.true_sequential,
        )
        if name == BASELINE:
            options = replace(options, method=BASELINE, targets=STREAM, true_sequential=True)
        with pytest.MonkeyPatch.context() as patch:
            if name == "from-disk":
                patch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
            quantize(options, say=lambda line: None)


def measure_all(models: Folders, words: Path) -> list[Any]:
    """Perplexity and divergence on a number of windows that is less than that of processes, and on more."""
    stream = text.read_text(str(words), text.EVALUATION)
    found: list[Any] = []
    for windows in (3, 7):
        # Two models of one vocabulary.
        both = [load_original(str(models[name])) for name in ("qwen3", "mixtral")]
        compute = default_compute()
        found.append(asdict(measure_on(both[0], stream, 24, windows, compute)))
        decoder = locate_layers(both[0].model)
        chosen = evaluation_windows(tokenize(stream, both[0].tokenizer), 24, windows)
        found.append(asdict(measure_by_layers(both[0].model, decoder, chosen, 400, "", compute)))
        found += map(asdict, divergence_on(*both, stream, 24, windows, compute))
    return found


@pytest.fixture(scope="module")
def alone(models: Folders, words_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by one process."""
    out = tmp_path_factory.mktemp("alone")
    quantize_all(models, words_file, out)
    write_json(out / "measured.json", {"found": measure_all(models, words_file)})
    return out


@pytest.fixture(scope="module", params=[2, 4])
def shared(
    request: pytest.FixtureRequest,
    alone: Path,  # compiles what the processes then need not compile
    models: Folders,
    words_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[int, Path]:
    """Every case by several processes, of which only the first is told where to write."""
    out = tmp_path_factory.mktemp("shared")

    def work(ranks: Ranks) -> None:
        quantize_all(models, words_file, out if ranks.first else out / "nowhere" / str(ranks.rank))
        write_json(out / f"measured-{ranks.rank}.json", {"found": measure_all(models, words_file)})

    in_processes(request.param, work)
    return request.param, out


def figures_of(folder: Path) -> dict[str, Any]:
    """What a report says of the result, without times."""
    report = json.loads((folder / REPORT).read_text())
    for layer in report["layers"]:
        del layer["seconds"]
        layer.pop("bytes_between_processes", None)
        for matrix in layer["matrices"]:
            del matrix["seconds"]
    kept = ("layers", "perplexity", "mean_relative_output_error", "calibration", "config")
    return {name: report[name] for name in kept}


@pytest.mark.parametrize("case", CASES)
def test_the_checkpoint_and_its_figures_are_the_same(
    case: str, alone: Path, shared: tuple[int, Path]
) -> None:
    size, out = shared
    assert files_of(alone / case) == files_of(out / case)
    assert figures_of(alone / case) == figures_of(out / case)
    assert json.loads((out / case / REPORT).read_text())["processes"] == size
    assert not (out / "nowhere").exists()


def test_perplexity_and_divergence_are_the_same_in_every_process(
    alone: Path, shared: tuple[int, Path]
) -> None:
    size, out = shared
    expected = read_json(alone / "measured.json")
    assert len(expected["found"]) == 8
    for rank in range(size):
        assert read_json(out / f"measured-{rank}.json") == expected


def test_the_bytes_between_processes_are_those_of_the_count(shared: tuple[int, Path]) -> None:
    """For the matrices of the small model, all of one panel: counted by hand."""
    size, out = shared
    width, inner, others = tiny.WIDTH, tiny.INNER, size - 1
    shapes = {"q": (width, width), "k": (width // 2, width), "v": (width // 2, width)}
    shapes |= {"o": (width, width), "gate": (inner, width), "up": (inner, width), "down": (width, inner)}

    def blocks(m: int, k: int) -> int:
        return -(-m // k)

    # Trits, permutation; codes of alpha and mu with factors of rows and blocks, or both in float16.
    best = sum(
        n * m + 8 * m + 2 * (n * blocks(m, 64) + 2 * n + 2 * blocks(m, 64)) for n, m in shapes.values()
    )
    paper = sum(n * m + 8 * m + 2 * 2 * n * blocks(m, 128) for n, m in shapes.values())
    # To one owner in pairs of float64; from it in float64 to the owners of the other matrices of a group.
    owners = {2: {"qkv": 2, "gate-up": 2}, 4: {"qkv": 3, "gate-up": 2}}[size]
    sums = {
        "qkv": others * 16 * width**2 + (owners["qkv"] - 1) * 8 * width**2,
        "o": others * 16 * width**2,
        "gate-up": others * 16 * width**2 + (owners["gate-up"] - 1) * 8 * width**2,
        "down": others * 16 * inner**2,
    }
    # What is lost has the shape of the Gram matrix, but of down_proj that of its weights.
    lost = sum(sums.values()) + others * 16 * (width * inner - inner**2)
    counted = {"dense-best": others * best + sum(sums.values()) + lost}
    if size == 2:  # all at once, by cost: down, q, k, v to one process, gate, up, o to the other
        counted["dense-paper"] = others * paper + sum(sums.values()) - 2 * 8 * width**2
    shape = Shape(width, inner, 3, heads=4, groups=2, vocabulary=tiny.VOCABULARY)
    for case, expected in counted.items():
        assert layer_bytes(shape, RECIPES[case.removeprefix("dense-")], size) == expected
        layers = json.loads((out / case / REPORT).read_text())["layers"]
        assert [layer["bytes_between_processes"] for layer in layers] == [expected] * 3
