"""Plots show the numbers of their file and the machine they come from, and are the same at every run."""

from __future__ import annotations

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

from harness.benchmark import plot
from harness.benchmark.__main__ import main as benchmark_main
from harness.benchmark.shapes import SHAPES
from harness.cli import EXIT_USAGE

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


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def lines(panel: Axes) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in panel.lines
        if not str(line.get_label()).startswith("_")
    }


def test_lines_of_products_are_the_numbers_of_the_file() -> None:
    figure = plot.figure_of(matmul("llama-7b", "llama-65b"))
    packed, _, share, _, dequantized, _, other, last = figure.axes
    assert lines(packed) == {
        "q and o": [(1, 4.0), (16, 0.5)],
        "down": [(1, 8.0), (16, 0.25)],
        "q, k and v in one launch": [(1, 6.0)],
    }
    assert lines(share)["down"] == [(1, 0.5), (16, 0.03125)]
    assert lines(dequantized)["q and o"] == [(1, 0.25), (16, 0.1)]
    assert lines(other) == {"q and o": [(1, 2.0)], "down": [], "q, k and v in one launch": []}
    assert [packed.get_title("left"), share.get_title("right")] == ["llama-7b", "100 % = 2,346 GB/s"]
    assert [panel.get_ylabel() for panel in (packed, share, dequantized, other)] == [
        "packed\ntimes as fast\nas dense",
        "packed\nbandwidth, share\nof a copy's",
        "dequantized\ntimes as fast\nas dense",
        "other\ntimes as fast\nas dense",
    ]
    assert last.get_xlabel() == "batch (rows of activations)"
    assert packed.get_xscale() == packed.get_yscale() == "log"
    # Panels can only be compared on one scale, and it has to hold the slowest and the fastest.
    assert packed.get_ylim() == dequantized.get_ylim() == other.get_ylim()
    assert packed.get_ylim()[0] < 0.1 < 8 < packed.get_ylim()[1]


def test_bars_of_generation_are_the_numbers_of_the_file() -> None:
    figure = plot.figure_of(generate("llama-7b", "llama-65b"))
    heights = [[bar.get_height() for bar in panel.patches] for panel in figure.axes]
    assert heights == [[12000.0, 11400.0] * 2, [50.5, 101.0] * 2, [75.0, 225.0] * 2]
    assert [[text.get_text() for text in panel.texts[:3]] for panel in figure.axes] == [
        ["12k", "11.4k", "0.95×"],
        ["50.5", "101", "2.00×"],
        ["75", "225", "3.00×"],
    ]
    assert [panel.get_title("left").partition(":")[0] for panel in figure.axes] == [
        "prefill",
        "decode",
        "both",
    ]
    assert figure.axes[0].get_ylabel() == "tokens a second"
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["llama\n7b", "llama\n65b"]
    assert not any("layers" in text for text in texts(figure))


def test_generation_with_some_of_the_layers_says_so() -> None:
    figure = plot.figure_of(generate("llama-7b", "llama-65b", layers=32))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [
        "llama\n7b",
        "llama\n65b\n32 of 80\nlayers",
    ]
    assert any("the whole model is slower" in text for text in texts(figure))


@pytest.mark.parametrize("make", [matmul, generate])
def test_a_plot_says_what_it_was_measured_on(make: Callable[..., dict[str, Any]]) -> None:
    figure = plot.figure_of(make("tiny"))
    assert any(text.startswith(f"measured on {DEVICE}; bfloat16; 2001-02-03") for text in texts(figure))
    assert any("--shape tiny (torch 9.8.7)" in text for text in texts(figure))
    figure = plot.figure_of(make("tiny", device="CPU"))
    assert any(text.startswith("measured on CPU: Some CPU, 3 cores; bfloat16;") for text in texts(figure))


@pytest.mark.parametrize("shapes", [("tiny",), ("llama-7b", "llama3-8b"), PAPER, tuple(SHAPES)])
@pytest.mark.parametrize("make", [matmul, generate])
def test_nothing_that_is_written_overlaps_or_is_cut_off(
    make: Callable[..., dict[str, Any]], shapes: tuple[str, ...]
) -> None:
    record = make(*shapes, device="CPU")
    record["machine"]["cpu"] = "Some(R) Company(R) Family 1234X 56-Core Processor @ 7.89GHz"
    for result in record["results"].values():
        result.update(layers=2)
    for products in (result.get("products", []) for result in record["results"].values()):
        products.extend(product("k and v", 2**power, 1.0, 2.0) for power in range(14))
    with plot._style():
        figure = plot.figure_of(record)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        boxes = [
            (text.get_text(), text.get_window_extent())
            for text in figure.findobj(Text)
            if text.get_text().strip() and text.get_visible() and _is_shown(text)
        ]
    assert len(boxes) > 20
    width, height = canvas.get_width_height()
    for text, box in boxes:
        assert 0 <= box.x0, text
        assert box.x1 <= width, text
        assert 0 <= box.y0, text
        assert box.y1 <= height, text
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        assert not first.overlaps(second), f"{one!r} and {other!r}"


def _is_shown(text: Text) -> bool:
    """Whether a text is not the label of a tick outside of its axis."""
    panel = text.axes
    if panel is None:
        return True
    for axis in (panel.xaxis, panel.yaxis):
        for tick in axis.get_major_ticks():
            if text in (tick.label1, tick.label2):
                low, high = sorted(axis.get_view_interval())
                return low <= tick.get_loc() <= high
    return True


@pytest.mark.parametrize("make", [matmul, generate])
def test_the_file_is_the_same_at_every_run_and_with_every_setting(
    make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    file, settings = tmp_path / "results.json", tmp_path / "matplotlibrc"
    file.write_text(json.dumps(make(*PAPER)))
    settings.write_text("font.size: 20\nsvg.fonttype: none\naxes.facecolor: red\n")
    target = plot.draw(file)
    assert target == tmp_path / "results.svg"
    elsewhere = tmp_path / "new" / "again.svg"
    program = (
        "import sys; from pathlib import Path; from harness.benchmark.plot import draw;"
        " draw(*map(Path, sys.argv[1:]))"
    )
    subprocess.run(
        [sys.executable, "-c", program, file, elsewhere],
        env={**os.environ, "PYTHONHASHSEED": "1", "MATPLOTLIBRC": str(settings)},
        check=True,
    )
    assert elsewhere.read_bytes() == target.read_bytes()
    assert b"<dc:date>" not in target.read_bytes()


def test_a_dollar_in_a_command_is_no_formula(tmp_path: Path) -> None:
    record = {**matmul("tiny"), "command": r"benchmark $\nosuch$.json"}
    assert rb"benchmark $\nosuch$.json" in plot.svg_of(record)


def test_products_are_drawn_as_soon_as_they_are_measured(
    tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "matmul.json"
    assert run_main(benchmark_main, "matmul", file, "--shape", "tiny", "--batch", "1", "3") == 0
    printed = capsys.readouterr()
    assert "tiny" in json.loads(printed.out)
    assert printed.err == f"plot: {tmp_path / 'matmul.svg'}\n"
    drawn = (tmp_path / "matmul.svg").read_bytes()
    # What is written is drawn as shapes, each after a comment with the text.
    builder = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.fromstring(drawn, builder)
    written = [element.text for element in root.iter() if element.tag is ElementTree.Comment]
    record = json.loads(file.read_text())
    assert any(f"measured on CPU: {record['machine']['cpu']}" in text for text in written)
    assert " tiny " in written

    figure = plot.figure_of(record)
    assert lines(figure.axes[0])["k and v"] == [
        (row["batch"], row["times_faster_than_dense"])
        for row in record["results"]["tiny"]["products"]
        if row["matrix"] == "k and v"
    ]
    assert run_main(benchmark_main, "plot", file, tmp_path / "again.svg") == 0
    assert (tmp_path / "again.svg").read_bytes() == drawn


def test_results_are_kept_where_there_is_no_matplotlib(
    tmp_path: Path, run_main: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = tmp_path / "generate.json"
    size = ("--layers", "1", "--prefill", "6", "--decode", "4")
    assert run_main(benchmark_main, "generate", file, "--shape", "tiny", *size) == 0
    missing = "plots are drawn with the package matplotlib: pip install matplotlib"
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
        ([], "only results of harness.benchmark's matmul and generate have a plot"),
        (record_of("matmul", {}), "only results of harness.benchmark's matmul and generate have a plot"),
        (record_of("run", {"ratio": 1.3, "model": "m"}), "only results of"),
        (record_of("quantize", {"tiny": {"seconds_a_layer": {}}}), "only results of"),
        (_without(matmul("tiny"), "results", "tiny", "products", 0, "dense_us"), "there is no 'dense_us'"),
        (_without(matmul("tiny"), "results", "tiny", "device"), "there is no 'device'"),
        (_without(generate("tiny"), "results", "tiny", "ternary", "both"), "there is no 'both'"),
        (_without(generate("tiny"), "date"), "there is no 'date'"),
        (_with_first_product(packed_us="nan", dequantized_us="nan"), "'nan' is no number"),
        (_with_first_product(batch=0), "0 is not above 0"),
        (record_of("matmul", {"tiny": {"products": []}}), "a shape has no products"),
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
    assert plot.draw(odd) == tmp_path / "results.svg.svg"
    assert odd.read_text() == content
