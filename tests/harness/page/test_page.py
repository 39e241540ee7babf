"""The page shows the figures of its record, refers to nothing, and stays small."""

from __future__ import annotations

import json
import math
import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from harness.files import json_text
from harness.page import page as page_module
from harness.page.page import MOST_BYTES, page, write_page
from tests.harness.page.reading import Read, read
from tests.harness.page.records import DENSE, record_of

# What can name something that a browser fetches.
ADDRESSES = {"src", "srcset", "href", "xlink:href", "action", "formaction", "data", "poster", "background"}

EVIL = "<script>alert(1)</script>\"'&amp;<img src=x onerror=y>"


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """Three layers of a dense model. Not to be changed."""
    return record_of()


@pytest.fixture
def drawn(record: dict[str, Any], with_plots: None) -> str:
    return page(record)


def body_of(table: list[list[str]]) -> dict[str, list[str]]:
    """Rows of a table by their first cell."""
    return {row[0]: row[1:] for row in table}


def test_the_summary_shows_the_figures_of_the_record(record: dict[str, Any]) -> None:
    found = read(page(record))
    for words in (
        "some/model, ternary",
        "bits per weight 2.000",
        "weights on disk 35.0 MB original 400.0 MB, 11.4 × as much",
        "perplexity 34.57 original 12.35",
        "output error 6.2% mean of the layers",
        "time 48 s peak memory 1.5 GB",
        "python -m harness.quantize some/model --out 'some folder'",
        "123.0 M weights in 21 matrices, 50.0% of the decoder layers",
        "8 windows of 512 tokens; some text; no BOS token",
        "torch 9.8.7",
        "some protocol",
    ):
        assert words in " ".join(" ".join(found.words).split()), words
    assert body_of(found.tables["quality"])["perplexity"] == ["12.35", "34.57"]
    sizes = body_of(found.tables["sizes"])
    assert sizes["original weights"] == ["400,000,000", ""]
    assert sizes["ternary matrices"] == ["30,750,000", "2.000"]
    assert sizes["embeddings, head, norms and biases"] == ["4,000,000", ""]
    assert sizes["weight files of the checkpoint"] == ["35,000,000", ""]


def test_times_by_stage_add_up_to_the_whole(record: dict[str, Any]) -> None:
    _, *rows = read(page(record)).tables["time"]
    times = {stage: float(seconds) for stage, seconds, _ in rows}
    assert times.pop("all") == 47.5 == sum(times.values())
    # Three layers, and what they did not account for of the 40 seconds.
    assert times["layers: fits"] == 15
    assert times["layers: rest"] == 40 - 3 * 8.5


def test_every_error_stands_in_its_row_and_column(record: dict[str, Any]) -> None:
    head, *rows = read(page(record)).tables["errors"]
    assert head == ["layer", "all", *(kind.rpartition(".")[2] for kind in DENSE)]
    assert len(rows) == 3
    for layer, row in zip(record["layers"], rows, strict=True):
        assert int(row[0]) == layer["layer"]
        errors = [layer["relative_output_error"], *(m["relative_output_error"] for m in layer["matrices"])]
        for cell, error in zip(row[1:], errors, strict=True):
            assert float(cell) == pytest.approx(100 * error, rel=0.05)


def test_the_worst_matrices_come_first(record: dict[str, Any]) -> None:
    errors = {m["name"]: m["relative_output_error"] for layer in record["layers"] for m in layer["matrices"]}
    _, *rows = read(page(record)).tables["worst"]
    names = [row[0].split(" ")[0] for row in rows]
    assert names == sorted(errors, key=lambda name: -errors[name])[: len(rows)]
    for name, row in zip(names, rows, strict=True):
        assert float(row[1].removesuffix("%")) == pytest.approx(100 * errors[name], rel=0.05)
        kind = sorted(error for other, error in errors.items() if other.split(".")[3:] == name.split(".")[3:])
        assert float(row[2]) == pytest.approx(errors[name] / kind[1], abs=0.051)  # of three, the median


def test_divergence_is_shown_where_it_was_measured(record: dict[str, Any]) -> None:
    assert "KL" not in read(page(record)).text
    measured = {"mean": 0.123456, "percentile_99": 2.5, "agreement": 0.875, "tokens": 99}
    found = read(page({**record, "divergence": measured}))
    quality = body_of(found.tables["quality"])
    assert quality["KL divergence, mean"] == ["0", "0.1235"]
    assert quality["KL divergence, 99th percentile"] == ["0", "2.5"]
    assert quality["same most likely token"] == ["100%", "87.5%"]
    assert "harness.evaluate" not in found.text


def test_experts_of_a_layer_share_a_cell() -> None:
    record = record_of(layers=2, experts=5)
    head, *rows = read(page(record)).tables["errors"]
    assert head[-3:] == ["gate_proj", "up_proj", "down_proj"]
    downs = [m for m in record["layers"][1]["matrices"] if m["name"].endswith("down_proj")]
    assert len(downs) == 5
    lost = sum(m["relative_output_error"] * m["output_power"] for m in downs)
    assert float(rows[1][-1]) == pytest.approx(100 * lost / sum(m["output_power"] for m in downs), rel=0.05)


@pytest.mark.parametrize(
    ("shape", "table"),
    [
        ({"layers": 48, "experts": 128}, True),
        ({"layers": 126}, True),
        ({"layers": 300, "kinds": tuple(f"mixer.number_{i}_of_a_long_name_proj" for i in range(80))}, False),
    ],
)
def test_a_page_of_the_largest_models_stays_small(
    shape: dict[str, Any], table: bool, with_plots: None
) -> None:
    """The first is a mixture with 18,624 matrices."""
    html = page(record_of(**shape))
    assert len(html.encode()) <= MOST_BYTES == 1_000_000
    found = read(html)
    assert len(found.tables.get("errors", [])) == (shape["layers"] + 1 if table else 0)
    assert ("too large for this page" in found.text) != table


def outside(found: Read) -> list[str]:
    """What a page names that is not inside it."""
    pairs = [pair for _, attributes in found.tags for pair in attributes.items()]
    values = [str(value) for name, value in pairs if name in ADDRESSES]
    styles = found.styles + " ".join(str(a.get("style", "")) for _, a in found.tags)
    values += re.findall(r"url\(([^)]*)\)", styles) + re.findall(r"@import[^;]*", styles)
    values += [str(a["clip-path"])[4:-1] for _, a in found.tags if "clip-path" in a]
    return [value for value in values if not value.startswith(("#", "data:"))]


def test_a_page_refers_to_nothing_outside(drawn: str) -> None:
    found = read(drawn)
    assert outside(found) == []
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "iframe", "object", "embed", "img", "base", "form"}
    assert "svg" in names
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)


def test_what_would_be_fetched_is_found() -> None:
    """The check above would see it."""
    bad = '<p style="background: url(x.png)"><img src="http://a.b/c"><use xlink:href="d#e"/></p>'
    found = Read()
    found.feed(bad.replace("<img", "<wbr"))
    assert sorted(outside(found)) == ["d#e", "http://a.b/c", "x.png"]


def test_ids_are_unique_and_every_reference_has_its_target(drawn: str) -> None:
    ids = re.findall(r'\bid="([^"]*)"', drawn)
    assert len(ids) == len(set(ids)) > 20
    used = set(re.findall(r'(?:href="|url\()#([^")]*)', drawn))
    assert used
    assert used <= set(ids)


def test_plots_have_only_colours_that_change_with_the_theme(drawn: str) -> None:
    _, *plots = drawn.split("<svg")
    assert len(plots) == 9
    for plot in plots:
        svg = plot.partition("</svg>")[0]
        assert not re.search(r"(?:fill|stroke): ?#|rgb\(|font-family|black|white", svg)
        assert "<text" in svg
    variables = set(re.findall(r"var\((--[a-z-]+)\)", drawn))
    light, dark = re.findall(r":root \{(.*?)\}", drawn, flags=re.DOTALL)
    for variable in variables - {"--d"}:  # which is of a cell
        values = [re.search(rf"{variable}: ([^;]+);", theme) for theme in (light, dark)]
        assert values[0] is not None
        assert values[1] is not None
        assert values[0][1] != values[1][1]


def test_names_and_texts_are_escaped(record: dict[str, Any], with_plots: None) -> None:
    evil = deepcopy(record)
    evil.update(model=EVIL, command=EVIL, created=f"2001-02-03{EVIL}", device=EVIL, divergence=None)
    evil["calibration"].update(text=EVIL, bos=EVIL, targets=EVIL)
    evil["plan"]["not_understood"] = evil["plan"]["skipped"] = EVIL
    evil["perplexity"]["after"]["protocol"] = EVIL
    evil["versions"][EVIL] = EVIL
    evil["options"][EVIL] = EVIL
    evil["seconds"][EVIL] = 1.0
    for layer in evil["layers"]:
        layer["seconds"][EVIL] = 1.0
        layer["grid"][EVIL] = layer["grid"]["mlp.down_proj"]
        for matrix in layer["matrices"]:
            matrix["name"] += EVIL
    found = read(page(evil))
    assert not {tag for tag, _ in found.tags} & {"script", "img"}
    assert not any("onerror" in attributes for _, attributes in found.tags)
    assert found.text.count("<script>alert(1)</script>") > 20
    assert f"{EVIL}, ternary" in found.text


def test_a_name_that_is_not_unicode_is_written_with_escapes(record: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_page({**record, "model": "a\udcff"}, file)
    assert "a\\udcff, ternary" in read(file.read_text("utf-8")).text


def test_without_matplotlib_a_page_has_tables_and_says_how_to_get_plots(
    record: dict[str, Any], with_plots: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = read(page(record))
    assert "svg" not in {tag for tag, _ in found.tags}
    assert "Plots need matplotlib" in found.text
    assert "python -m harness.report DIR" in found.text
    assert len(found.tables["errors"]) == 4


def test_a_record_from_a_file_gives_the_same_page(record: dict[str, Any], drawn: str) -> None:
    assert page(json.loads(json_text(record))) == drawn
    assert "Plots need matplotlib" not in drawn


def test_a_record_of_an_older_version_is_drawn_too(record: dict[str, Any], with_plots: None) -> None:
    older = deepcopy(record)
    for name in ("command", "original_bytes", "checkpoint_bytes", "peak_memory_bytes"):
        del older[name]
    del older["options"]["recipe"]
    for layer in older["layers"]:
        del layer["grid"]
        for matrix in layer["matrices"]:
            for name in ("trits", "tokens", "lost_blocks", "refinement_errors"):
                del matrix[name]
    found = read(page(older))
    assert "original weights" not in found.text
    assert "PT²-LLM" in found.text


def test_a_page_of_a_run_that_goes_on_says_so(record: dict[str, Any], with_plots: None) -> None:
    started = {name: value for name, value in record.items() if name != "mean_relative_output_error"}
    started |= {"layers": record["layers"][:1], "perplexity": {}, "resumed_after": [1, 2, 7]}
    found = read(page(started))
    assert "The run has not ended: 1 layer finished." in found.text
    assert "The run was resumed after layer 1, 2 and 7." in found.text
    assert "Perplexity was not measured" in found.text
    assert "matplotlib" not in read(page(started | {"layers": []})).text


def test_a_baseline_has_a_page(record: dict[str, Any], with_plots: None) -> None:
    baseline = deepcopy(record)
    baseline.update(method="gptq-2bit", config={"block_size": 128, "damping": 0.01})
    for name in ("plan", "checkpoint_bytes"):
        del baseline[name]
    kept = ("name", "shape", "tokens", "dead_inputs", "lost_blocks", "seconds", "output_power")
    for layer in baseline["layers"]:
        del layer["grid"]
        layer["matrices"] = [
            {name: row[name] for name in (*kept, "relative_output_error")} for row in layer["matrices"]
        ]
    found = read(page(baseline))
    assert "some/model, quantized" in found.text
    assert "gptq-2bit" in found.text
    assert "ternary" not in found.text


def test_figures_that_are_not_finite_are_shown_as_such(record: dict[str, Any], with_plots: None) -> None:
    broken = deepcopy(record)
    broken["perplexity"]["after"]["value"] = math.inf
    broken["layers"][1]["matrices"][2]["relative_output_error"] = math.nan
    broken["layers"][1]["relative_output_error"] = math.nan
    broken["mean_relative_output_error"] = math.nan
    for value in (broken, json.loads(json_text(broken))):
        found = read(page(value))
        assert body_of(found.tables["quality"])["perplexity"] == ["12.35", "inf"]
        assert found.tables["worst"][1][0].startswith("model.layers.1.self_attn.v_proj")
        assert found.tables["errors"][2][1] == "nan"


@pytest.mark.parametrize("value", [0.0, 0.00012345, 0.0999, 0.0995, 0.1, 1.0])
def test_percentages_keep_two_digits(value: float) -> None:
    shown = page_module.percent(value)
    assert float(shown.removesuffix("%")) == pytest.approx(100 * value, rel=0.05)
    assert len(shown) <= len("0.00012%")
