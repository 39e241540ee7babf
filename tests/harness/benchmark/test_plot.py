"""Plots show the numbers of their file and the machine they come from, and are the same at every run."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from harness.benchmark import figures
from harness.benchmark.__main__ import main as benchmark_main
from harness.benchmark.shapes import SHAPES
from harness.cli import EXIT_USAGE
from harness.comparison.methods import METHODS
from harness.comparison.plots import STYLE
from harness.plotting import styled

Run = Callable[..., int]

DEVICE = "No Such Device 80GB"
PAPER = ("llama-7b", "llama-13b", "llama-30b", "llama-65b")


def record_of(kind: str, results: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": f"python -m harness.benchmark {kind} {kind}.json --shape {' '.join(results)}",
        "date": "2001-02-03",
        "machine": {"cpu": "Some CPU", "cores": 3, "versions": {"torch": "9.8.7"}},
        "results": results,
    }


def product(matrix: str, batch: int, packed: float, dense: float, **further: float) -> dict[str, Any]:
    return {
        "matrix": matrix,
        "rows": 64,
        "columns": 32,
        "batch": batch,
        "packed_us": packed,
        "dense_us": dense,
        **further,
        "share_of_copy_bandwidth": 0.5 / batch,
        "times_faster_than_dense": dense / packed,
    }


def matmul(*shapes: str, device: str = DEVICE) -> dict[str, Any]:
    products = [
        product("q and o", 16, 8.0, 4.0, dequantized_us=40.0),
        product("q and o", 1, 2.0, 8.0, dequantized_us=32.0, other_us=4.0),
        product("down", 1, 1.0, 8.0, dequantized_us=16.0),
        product("down", 16, 16.0, 4.0, dequantized_us=20.0),
        product("q, k and v in one launch", 1, 3.0, 18.0),
    ]
    result = {"dtype": "bfloat16", "device": device, "copy_gb_s": 2345.67, "products": products}
    return record_of("matmul", {shape: {"shape": shape, **result} for shape in shapes})


def generate(*shapes: str, layers: int = 1000, device: str = DEVICE) -> dict[str, Any]:
    def result(shape: str) -> dict[str, Any]:
        depth = SHAPES[shape].layers
        return {
            "shape": shape,
            "layers": min(layers, depth),
            "layers_of_the_model": depth,
            "tokens": "128 read, 256 written",
            "dtype": "bfloat16",
            "device": device,
            "dense": {"prefill": 12000.0, "decode": 50.5, "both": 75.0, "bytes": 8},
            "ternary": {"prefill": 11400.0, "decode": 101.0, "both": 225.0, "bytes": 1},
            "ternary_over_dense": {"prefill": 0.95, "decode": 2.0, "both": 3.0, "bytes": 0.125},
        }

    return record_of("generate", {shape: result(shape) for shape in shapes})


def methods(**results: Any) -> dict[str, Any]:
    found = {
        "original": {"perplexity": 19.13},
        "protocol": {"evaluation": "some text, 8 windows"},
        "SSR + ITF + AGA": {"bits_per_weight": 1.903, "perplexity": 804.47},
        "another one": {"bits_per_weight": 2.141, "perplexity": 145.98},
        **results,
    }
    return record_of("methods", found)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def lines(panel: Axes) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in panel.lines
        if not str(line.get_label()).startswith("_")
    }


def test_lines_of_products_are_the_numbers_of_the_file() -> None:
    figure = figures.figure_of(matmul("llama-7b", "llama-65b"))
    assert [panel.get_title("left") for panel in figure.axes] == ["llama-7b", "llama-65b"]
    for panel in figure.axes:
        drawn = lines(panel)
        assert drawn.pop("as fast as dense")[0][1] == 1
        assert drawn == {
            "q and o": [(1, 4.0), (16, 0.5)],
            "down": [(1, 8.0), (16, 0.25)],
            "q, k and v in one launch": [(1, 6.0)],
        }
        assert panel.get_xscale() == panel.get_yscale() == "log"
        assert panel.get_ylim() == figure.axes[0].get_ylim()  # or panels could not be compared
    assert {*lines(figure.axes[0])} <= {*texts(figure)}  # in the legend


def test_a_matrix_looks_the_same_in_every_panel_and_is_in_the_legend() -> None:
    record = matmul("llama-7b", "llama3-8b")
    wider = record["results"]["llama3-8b"]
    wider["products"] = [product("k and v", 1, 2.0, 4.0), *wider["products"]]
    figure = figures.figure_of(record)
    looks = [
        {line.get_label(): (line.get_color(), line.get_marker()) for line in panel.lines}
        for panel in figure.axes
    ]
    assert "k and v" not in looks[0]
    assert "k and v" in looks[1]
    assert looks[1] | looks[0] == looks[1]
    assert len(set(looks[1].values())) == len(looks[1])
    assert "k and v" in texts(figure)


def test_bars_of_generation_are_the_numbers_of_the_file() -> None:
    figure = figures.figure_of(generate("llama-7b", "llama-65b", layers=32))
    heights = [[bar.get_height() for bar in panel.patches] for panel in figure.axes]
    assert heights == [[12000.0] * 2 + [11400.0] * 2, [50.5] * 2 + [101.0] * 2, [75.0] * 2 + [225.0] * 2]
    assert [panel.get_title("left") for panel in figure.axes] == [
        "prefill: reading the prompt",
        "decode: writing after it",
        "both: end to end",
    ]
    for panel in figure.axes:
        # A model of which only some layers were measured says so.
        names = [label.get_text() for label in panel.get_xticklabels()]
        assert names == ["llama-7b", "llama-65b\n32 of 80 layers"]
    assert {"dense", "ternary", "12,000", "50.5", "225"} <= {*texts(figure)}


@pytest.mark.parametrize("make", [matmul, generate])
def test_a_plot_of_speed_says_what_it_was_measured_on(make: Callable[..., dict[str, Any]]) -> None:
    heading = " ".join(texts(figures.figure_of(make("tiny"))))
    assert f"measured on {DEVICE}; bfloat16" in heading
    assert "2001-02-03" in heading
    heading = " ".join(texts(figures.figure_of(make("tiny", device="CPU"))))
    assert "measured on CPU: Some CPU, 3 cores; bfloat16" in heading


def test_points_of_methods_are_the_numbers_of_the_file() -> None:
    broken = {"a": {"error": "not positive definite"}, "b": {"bits_per_weight": 1.0, "perplexity": "inf"}}
    figure = figures.figure_of(methods(**broken))
    (panel,) = figure.axes
    original, points = panel.lines
    assert list(original.get_ydata()) == [19.13, 19.13]
    drawn = list(zip(points.get_xdata(), points.get_ydata(), strict=True))
    assert drawn == [(1.903, 804.47), (2.141, 145.98)]
    assert panel.get_yscale() == "log"
    # Each label is tied to its point.
    assert {label.get_text(): label.xy for label in panel.texts} == {
        "original: 19.1": (panel.get_xlim()[1], 19.13),
        "SSR + ITF + AGA: 804": (1.903, 804.47),
        "another one: 146": (2.141, 145.98),
    }
    assert any("Diverged: a, b. Text: some text, 8 windows; 2001-02-03" in text for text in texts(figure))


@pytest.mark.parametrize("perplexity", [20.0, 19.2, 1e6])
def test_labels_of_methods_do_not_touch_even_where_points_do(perplexity: float) -> None:
    """Every method there is, with nearly one perplexity."""
    results = {
        method.words: {"bits_per_weight": 1.9 + 0.01 * i, "perplexity": perplexity + 0.001 * i}
        for i, method in enumerate(METHODS.values())
    }
    with styled(STYLE):
        figure = figures.figure_of(methods(**results))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        # Without the lines to the points, which an annotation counts.
        boxes = [Text.get_window_extent(label) for label in figure.axes[0].texts]
    boxes.sort(key=lambda box: box.y0)
    assert len(boxes) == len(METHODS) + 3
    width, height = canvas.get_width_height()
    assert boxes[0].y0 >= 0
    assert boxes[-1].y1 <= height
    assert all(box.x1 <= width for box in boxes)
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))


def test_the_picture_of_the_readme_shows_the_figures_beside_it() -> None:
    """Its text is drawn as shapes, each after a comment with a line of it."""
    folder = Path(figures.__file__).parents[2] / "benchmarks"
    written = " ".join(comments(folder / "recipe.svg"))
    for method, result in json.loads((folder / "recipe.json").read_text())["results"].items():
        if method != "protocol":
            digits = 0 if result["perplexity"] > 100 else 1
            assert f"{method}: {result['perplexity']:,.{digits}f}" in written


def comments(svg: Path) -> list[str]:
    builder = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.fromstring(svg.read_bytes(), builder)
    return [(element.text or "").strip() for element in root.iter() if element.tag is ElementTree.Comment]


@pytest.mark.parametrize("record", [matmul(*PAPER), generate(*PAPER), methods()])
def test_the_file_is_the_same_at_every_run_and_with_every_setting(
    record: dict[str, Any], tmp_path: Path
) -> None:
    file, settings = tmp_path / "results.json", tmp_path / "matplotlibrc"
    file.write_text(json.dumps(record))
    settings.write_text("font.size: 20\nsvg.fonttype: none\naxes.facecolor: red\n")
    target = figures.draw(file)
    assert target == tmp_path / "results.svg"
    elsewhere = tmp_path / "new" / "again.svg"
    program = (
        "import sys; from pathlib import Path; from harness.benchmark.figures import draw;"
        " draw(*map(Path, sys.argv[1:]))"
    )
    subprocess.run(
        [sys.executable, "-c", program, file, elsewhere],
        env={**os.environ, "PYTHONHASHSEED": "1", "MATPLOTLIBRC": str(settings)},
        check=True,
    )
    assert elsewhere.read_bytes() == target.read_bytes()
    assert b"<dc:date>" not in target.read_bytes()


def test_a_dollar_in_a_name_is_no_formula() -> None:
    record = methods(**{r"$\nosuch$": {"bits_per_weight": 2.0, "perplexity": 200.0}})
    with styled(STYLE):
        figures.figure_of(record).savefig(io.BytesIO(), format="svg")


def test_products_are_drawn_as_soon_as_they_are_measured(
    tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "matmul.json"
    assert run_main(benchmark_main, "matmul", file, "--shape", "tiny", "--batch", "1", "3") == 0
    printed = capsys.readouterr()
    assert "tiny" in json.loads(printed.out)
    assert printed.err == f"plot: {tmp_path / 'matmul.svg'}\n"
    assert "tiny" in comments(tmp_path / "matmul.svg")

    record = json.loads(file.read_text())
    figure = figures.figure_of(record)
    assert lines(figure.axes[0])["k and v"] == [
        (row["batch"], row["times_faster_than_dense"])
        for row in record["results"]["tiny"]["products"]
        if row["matrix"] == "k and v"
    ]
    assert run_main(benchmark_main, "plot", file, tmp_path / "again.svg") == 0
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "matmul.svg").read_bytes()


def test_results_are_kept_where_there_is_no_matplotlib(
    tmp_path: Path, run_main: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = tmp_path / "generate.json"
    size = ("--layers", "1", "--prefill", "6", "--decode", "4")
    assert run_main(benchmark_main, "generate", file, "--shape", "tiny", *size) == 0
    missing = "plots need matplotlib: pip install matplotlib"
    assert f"no plot: {missing}\n" in capsys.readouterr().err
    assert "tiny" in json.loads(file.read_text())["results"]
    assert run_main(benchmark_main, "plot", file) == EXIT_USAGE
    assert capsys.readouterr().err == f"error: {missing}\n"
    assert list(tmp_path.iterdir()) == [file]


def _without(record: dict[str, Any], *keys: Any) -> dict[str, Any]:
    inner = record
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return record


def _with_first_product(**changes: Any) -> dict[str, Any]:
    record = matmul("tiny")
    record["results"]["tiny"]["products"][0].update(changes)
    return record


def _on_two_devices() -> dict[str, Any]:
    record = generate("tiny", "llama-7b")
    record["results"]["tiny"]["device"] = "CPU"
    return record


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is missing or damaged"),
        ([], "only results of harness.benchmark's methods, matmul and generate have"),
        (record_of("matmul", {}), "only results of harness.benchmark's methods, matmul and generate have"),
        (record_of("run", {"ratio": 1.3, "model": "m"}), "only results of"),
        (record_of("quantize", {"tiny": {"seconds_a_layer": {}}}), "only results of"),
        (_without(matmul("tiny"), "results", "tiny", "products", 0, "batch"), "there is no 'batch'"),
        (_without(matmul("tiny"), "results", "tiny", "device"), "there is no 'device'"),
        (_without(generate("tiny"), "results", "tiny", "ternary", "both"), "there is no 'both'"),
        (_without(generate("tiny"), "date"), "there is no 'date'"),
        (_without(methods(), "results", "protocol"), "there is no 'protocol'"),
        (_without(methods(), "results", "original"), "only results of"),
        (methods(x={"perplexity": 3.0}), "there is no 'bits_per_weight'"),
        (record_of("matmul", {"tiny": {"products": []}}), "only results of"),
        (methods(x=[]), "cannot be drawn"),
        (_with_first_product(times_faster_than_dense="nan"), "'nan' is not a positive number"),
        (_with_first_product(batch=0), "0 is not a positive number"),
        (record_of("matmul", {"tiny": {"products": ["row"]}}), "cannot be drawn"),
        (_on_two_devices(), f"its results differ in device (CPU, {DEVICE}); draw each run by itself"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    content: Any, message: str, tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    assert run_main(benchmark_main, "plot", file) == EXIT_USAGE
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]


def test_a_plot_goes_to_a_file_of_its_own(
    tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    assert run_main(benchmark_main, "plot", file) == EXIT_USAGE
    assert "results.json is missing or damaged" in capsys.readouterr().err
    content = json.dumps(matmul("tiny"))
    file.write_text(content)
    assert run_main(benchmark_main, "plot", file, file) == EXIT_USAGE
    assert "a name that ends in .svg" in capsys.readouterr().err
    assert run_main(benchmark_main, "plot", file, file / "plot.svg") == EXIT_USAGE
    assert "plot.svg cannot be written" in capsys.readouterr().err
    assert file.read_text() == content
    # Results in a file with any other name are not overwritten by their plot.
    odd = file.rename(tmp_path / "results.svg")
    assert figures.draw(odd) == tmp_path / "results.svg.svg"
    assert odd.read_text() == content
