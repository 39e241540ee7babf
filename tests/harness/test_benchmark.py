"""The benchmarks run on small models and say what they measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import benchmark
from harness.cli import EXIT_USAGE

Run = Callable[..., int]


def test_a_run_is_measured_stage_by_stage(
    tmp_path: Path, llama: Path, words_file: Path, run_main: Run
) -> None:
    file = tmp_path / "results" / "run.json"
    arguments = ("--model", llama, "--calibration", words_file, "--nsamples", "4", "--seqlen", "24")
    assert run_main(benchmark.main, "run", file, *arguments) == 0
    record = json.loads(file.read_text())
    assert record["command"].startswith("python -m harness.benchmark run")
    assert str(tmp_path) not in record["command"]
    assert record["machine"]["cpu"]
    assert {"load", "inputs", "fits", "outputs"} == record["results"]["seconds_by_stage"].keys()
    assert record["results"]["ratio"] > 0.5


def test_a_report_that_is_none_is_refused(
    tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    assert run_main(benchmark.main, "run", file, "--report", tmp_path / "no.json") == EXIT_USAGE
    assert "no.json is missing or damaged" in capsys.readouterr().err
    assert not file.exists()


def test_the_ratio_is_the_total_over_two_passes_that_make_outputs(tmp_path: Path, run_main: Run) -> None:
    layer = {"seconds": {"inputs": 11.0, "fits": 4.0, "outputs": 10.0}}
    record = {
        "model": "m",
        "calibration": {"nsamples": 8, "seqlen": 16, "text": "words"},
        "seconds": {"load": 2.0, "layers": 53.0, "perplexity before": 99.0},
        "layers": [layer, layer],
        "peak_memory_bytes": 2_000_000_000,
        "plan": {"bits_per_weight": 1.9},
        "mean_relative_output_error": 0.04,
        "perplexity": {},
    }
    (tmp_path / "report.json").write_text(json.dumps(record))
    file = tmp_path / "run.json"
    assert run_main(benchmark.main, "run", file, "--report", tmp_path / "report.json") == 0
    results = json.loads(file.read_text())["results"]
    assert results["seconds_without_evaluation"] == 55.0
    assert results["seconds_of_two_plain_passes"] == 40.0
    assert results["ratio"] == 1.375
    assert results["seconds_by_stage"] == {
        "load": 2.0,
        "perplexity before": 99.0,
        "inputs": 22.0,
        "fits": 8.0,
        "outputs": 20.0,
    }


def test_methods_are_compared_and_one_that_diverges_is_a_result(
    tmp_path: Path, llama: Path, words_file: Path, run_main: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "methods.json"
    names = ["ITF + AGA", "rtn-2bit (round to nearest on a min-max grid)"]
    diverging = ("no-such-method", benchmark.NO_ORDER)
    monkeypatch.setitem(benchmark.METHODS, "diverging", diverging)
    quantize = benchmark.quantize

    def fail(options: benchmark.Options, **rest: object) -> dict:
        if options.method == "no-such-method":
            raise benchmark.FitError("layer 0: beyond what float16 holds")
        return quantize(options, **rest)

    monkeypatch.setattr(benchmark, "quantize", fail)
    text = ("--calibration", words_file, "--eval", words_file, "--nsamples", "8", "--seqlen", "24")
    size = ("--eval-seqlen", "24", "--eval-windows", "2", "--model", llama)
    assert (
        run_main(benchmark.main, "methods", file, *text, *size, "--only", names[0], "diverging", names[1])
        == 0
    )
    results = json.loads(file.read_text())["results"]
    assert results["diverging"] == {"error": "layer 0: beyond what float16 holds"}
    # Weights on a ternary grid: ternarization finds them, two bits by min and max do not.
    assert results[names[0]]["mean_relative_output_error"] < 1e-3
    assert results[names[1]]["mean_relative_output_error"] > 1e-3
    assert results[names[1]]["bits_per_weight"] == pytest.approx(2 + 18 / 128, abs=1e-3)
    assert results["original"]["perplexity"] > 1
    assert "windows of 24" in results["protocol"]["evaluation"]
