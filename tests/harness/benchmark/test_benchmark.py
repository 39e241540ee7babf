"""The benchmarks run on small models and say what they measured."""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from harness.benchmark import busy, figures, generation
from harness.benchmark.__main__ import main as benchmark_main
from harness.benchmark.generation import generation_speed, random_network
from harness.benchmark.products import gemlite_product
from harness.benchmark.quantization import Scale, column_gptq, random_model
from harness.benchmark.shapes import SHAPES, Shape
from harness.calibration.methods import FitError
from harness.cli import EXIT_USAGE
from harness.comparison import speed
from harness.comparison.methods import METHODS, Method
from harness.comparison.speed import Lengths, fill
from harness.compute import Compute
from harness.errors import UserError
from harness.files import write_json
from harness.quantize.options import Options
from harness.quantize.run import quantize
from harness.ternary.format import packed_bytes, require_base3
from harness.ternary.linear import TernaryLinear
from reference import baselines

Run = Callable[..., int]


def test_a_run_is_measured_stage_by_stage(
    tmp_path: Path, llama: Path, words_file: Path, run_main: Run
) -> None:
    file = tmp_path / "results" / "run.json"
    arguments = ("--model", llama, "--calibration", words_file, "--nsamples", "4", "--seqlen", "24")
    assert run_main(benchmark_main, "run", file, *arguments) == 0
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
    assert run_main(benchmark_main, "run", file, "--report", tmp_path / "no.json") == EXIT_USAGE
    assert "no.json is missing or damaged" in capsys.readouterr().err
    assert not file.exists()


@pytest.mark.parametrize(
    ("name", "message"), [("", "is a folder"), ("x" * 250, "cannot be written: File name too long")]
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    name: str,
    message: str,
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "harness.benchmark.__main__.product_speed", lambda *arguments: pytest.fail("measured")
    )
    assert run_main(benchmark_main, "matmul", tmp_path / name, "--shape", "tiny") == EXIT_USAGE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "[1]", '{"seconds": {"load": 1, "layers": 2}, "layers": [{}]}'])
def test_json_that_is_no_report_is_refused(
    content: str, tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text(content)
    assert run_main(benchmark_main, "run", "--report", tmp_path / "other.json") == EXIT_USAGE
    assert "other.json is not a quantization report" in capsys.readouterr().err


def test_the_ratio_is_the_total_over_two_passes_that_make_outputs(tmp_path: Path, run_main: Run) -> None:
    layer = {"seconds": {"inputs": 11.0, "fits": 4.0, "outputs": 10.0}}
    record = {
        "model": "m",
        "calibration": {"nsamples": 8, "seqlen": 16, "text": "words"},
        "seconds": {"load": 2.0, "layers": 53.0, "perplexity before": 99.0},
        "layers": [layer, layer],
        "peak_memory_bytes": 2_000_000_000,
        "bits_per_weight": 1.9,
        "mean_relative_output_error": 0.04,
        "perplexity": {},
    }
    (tmp_path / "report.json").write_text(json.dumps(record))
    file = tmp_path / "run.json"
    assert run_main(benchmark_main, "run", file, "--report", tmp_path / "report.json") == 0
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
    monkeypatch.setitem(METHODS, "diverging", Method("diverging", "no-such-method"))

    def fail(options: Options, **rest: object) -> dict:
        if options.method == "no-such-method":
            raise FitError("layer 0: beyond what float16 holds")
        return quantize(options, **rest)

    monkeypatch.setattr("harness.comparison.measure.quantize", fail)
    text = ("--calibration", words_file, "--eval", words_file, "--nsamples", "8", "--seqlen", "24")
    size = ("--eval-seqlen", "24", "--eval-windows", "2", "--model", llama)
    saved: list[set[str]] = []

    def note(to: Path, value: dict) -> None:
        if to == file:
            saved.append(set(value["results"]) - {"original", "protocol"})
        write_json(to, value)

    monkeypatch.setattr("harness.benchmark.__main__.write_json", note)
    only = ("--only", "diverging", "no-order", "rtn-2bit")
    assert run_main(benchmark_main, "methods", file, *text, *size, *only) == 0
    assert saved[:3] == [{"diverging"}, {"diverging", names[0]}, {"diverging", *names}]
    record = json.loads(file.read_text())
    assert shlex.split(record["command"])[-4:] == list(only)
    results = record["results"]
    assert results["diverging"] == {"error": "layer 0: beyond what float16 holds"}
    # Weights on a ternary grid: ternarization finds them, two bits by min and max do not.
    assert results[names[0]]["mean_relative_output_error"] < 1e-3
    assert results[names[1]]["mean_relative_output_error"] > 1e-3
    # Each of the 736 rows of 128 weights has one group, each of the 128 rows of 176 has two.
    bits = 2 + 18 * (736 + 2 * 128) / (736 * 128 + 128 * 176)
    assert results[names[1]]["bits_per_weight"] == pytest.approx(bits, abs=1e-3)
    assert results["original"]["perplexity"] > 1
    assert "windows of 24" in results["protocol"]["evaluation"]
    assert b"rtn-2bit" in file.with_suffix(".svg").read_bytes()


def test_methods_are_not_compared_without_a_text(
    llama: Path, run_main: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "harness.comparison.measure.quantize", lambda *arguments, **options: pytest.fail("quantized")
    )
    assert run_main(benchmark_main, "methods", "--model", llama, "--eval", "none") == EXIT_USAGE
    assert "compared by perplexity, which needs a text; pass one with --eval" in capsys.readouterr().err


def test_layers_of_a_shape_go_through_the_whole_pipeline(tmp_path: Path, run_main: Run) -> None:
    file = tmp_path / "quantize.json"
    size = ("--nsamples", "3", "--seqlen", "64", "--backend", "reference")
    assert run_main(benchmark_main, "quantize", file, "--shape", "tiny", "--layers", "2", *size) == 0
    result = json.loads(file.read_text())["results"]["tiny"]
    assert (result["layers_measured"], result["layers_of_the_model"]) == (2, 3)
    assert result["extrapolated"]
    stages = {"load", "inputs", "fits", "outputs", "writing"}
    assert result["seconds_a_layer"].keys() == stages
    assert result["seconds_of_the_model"] > result["seconds_a_layer_in_all"] > 0
    assert result["seconds_a_layer_of_column_by_column_gptq"] > 0
    # Trits of the seven matrices at five to a byte: q and o, k and v, gate and up, down.
    trits = 2 * 96 * 20 + 2 * 48 * 20 + 2 * 256 * 20 + 96 * 52
    assert result["bytes_a_layer"] > trits


@pytest.mark.parametrize("family", sorted({shape.family for shape in SHAPES.values()}))
def test_layers_of_every_family_are_made(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some configurations have a setting for every layer, made for as many as there are."""
    monkeypatch.setitem(SHAPES, "small", Shape(96, 256, 3, 4, 2, 64, family))
    model, decoder, depth = random_model(Scale("small"), Compute())
    assert depth == len(decoder.layers) == model.config.num_hidden_layers == 3
    network = random_network("small", 2, None, Compute())
    assert network(torch.tensor([[1, 2]])).logits.shape == (1, 2, 64)


def test_random_layers_are_the_same_at_every_call_and_have_outliers() -> None:
    _, decoder, depth = random_model(Scale("tiny"), Compute())
    assert depth == len(decoder.layers) == 3
    name = "mlp.down_proj.weight"
    weight = decoder.tensors(1, [name])[name]
    assert torch.equal(weight, decoder.tensors(1, [name])[name])
    assert not torch.equal(weight, decoder.tensors(2, [name])[name])
    lengths = decoder.tensors(0, ["self_attn.q_proj.weight"])["self_attn.q_proj.weight"].float().norm(dim=0)
    assert lengths.max() > 5 * lengths.median()


def test_the_plain_gptq_that_is_timed_is_the_one_of_the_reference() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 150)) * rng.uniform(0.5, 2, 150)
    W, C = rng.normal(size=(7, 150)), X.T @ X
    W[3] = 0
    ours = column_gptq(torch.from_numpy(W), torch.from_numpy(C))
    np.testing.assert_allclose(ours.numpy(), baselines.gptq(W, C), atol=1e-12)


def test_tokens_a_second_of_a_dense_and_a_ternary_model(tmp_path: Path, run_main: Run) -> None:
    file = tmp_path / "generate.json"
    size = ("--layers", "2", "--prefill", "6", "--decode", "4")
    assert run_main(benchmark_main, "generate", file, "--shape", "tiny", *size) == 0
    result = json.loads(file.read_text())["results"]["tiny"]
    assert (result["layers"], result["layers_of_the_model"]) == (2, 3)
    for kind in ("dense", "ternary"):
        assert all(result[kind][figure] > 0 for figure in ("prefill", "decode", "both"))
    assert result["ternary_over_dense"]["decode"] == pytest.approx(
        result["ternary"]["decode"] / result["dense"]["decode"], rel=1e-3
    )


def test_writing_is_timed_by_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock and a model that agree: starting takes longer at some calls than all writing does."""
    now, starts = [0.0], itertools.cycle([90.0, 7.0, 1.0, 4.0])

    def write(prompt: torch.Tensor, max_new_tokens: int, streamer: Any = None, **options: object) -> None:
        def put(seconds: float) -> None:
            now[0] += seconds
            if streamer is not None:
                streamer.put(prompt)

        put(next(starts))
        for seconds in [2.0] + [0.25] * (max_new_tokens - 1):
            put(seconds)
        now[0] += 3.0

    model = SimpleNamespace(
        config=SimpleNamespace(vocab_size=9),
        generate=write,
        parameters=lambda: [torch.zeros(1)],
        buffers=lambda: [],
    )
    monkeypatch.setattr(generation, "random_network", lambda *arguments: model)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    # Dense runs start after 7, 1, 4, 90 and 7 seconds, ternary ones after 4, 90, 7, 1 and 4.
    result = generation_speed("tiny", Compute(), lengths=Lengths(prefill=18, decode=8))
    assert (result["dense"]["prefill"], result["ternary"]["prefill"]) == (2.0, 3.0)
    assert result["dense"]["decode"] == result["ternary"]["decode"] == 4.0
    both = result["dense"]["both"], result["ternary"]["both"]
    assert both == pytest.approx((26 / 14, 26 / 11), rel=1e-4)


@pytest.mark.parametrize("fault", [UserError("cannot be drawn"), RuntimeError("no font")])
def test_a_plot_that_fails_leaves_what_was_measured(
    fault: Exception,
    tmp_path: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "matmul.json"

    def fail(record: dict[str, Any]) -> None:
        assert json.loads(file.read_text()) == record
        raise fault

    monkeypatch.setattr("harness.benchmark.__main__.product_speed", lambda *arguments: {"products": []})
    monkeypatch.setattr(figures, "figure_of", fail)
    assert run_main(benchmark_main, "matmul", file, "--shape", "tiny") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"tiny": {"products": []}}
    assert printed.err == f"no plot: {fault}\n"


def test_products_are_timed_for_every_matrix_and_batch(tmp_path: Path, run_main: Run) -> None:
    file = tmp_path / "matmul.json"
    assert run_main(benchmark_main, "matmul", file, "--shape", "tiny", "--batch", "1", "3") == 0
    result = json.loads(file.read_text())["results"]["tiny"]
    assert [(row["rows"], row["columns"], row["batch"]) for row in result["products"][::2]] == [
        (96, 96, 1),
        (48, 96, 1),
        (256, 96, 1),
        (96, 256, 1),
        (96 + 2 * 48, 96, 1),
        (2 * 256, 96, 1),
    ]
    for row in result["products"]:
        assert row["times_faster_than_dense"] == pytest.approx(row["dense_us"] / row["packed_us"], rel=0.01)
    assert result["copy_gb_s"] > 0


def test_gemlite_is_given_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that computes what gemlite's documentation says: (codes - zeros) * scales by groups."""

    class A16Wn:
        def __init__(self, device: str, dtype: torch.dtype) -> None:
            self.dtype = dtype

        def from_weights(
            self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, group_size: int
        ) -> Callable[[torch.Tensor], torch.Tensor]:
            assert codes.dtype == torch.uint8
            assert codes.max() < 2**bits
            assert scales.dtype == zeros.dtype == self.dtype
            groups = codes.unflatten(1, (-1, group_size))
            weight = ((groups - zeros.float()[..., None]) * scales.float()[..., None]).flatten(1)
            return lambda x: x.float() @ weight.T

    monkeypatch.setitem(sys.modules, "gemlite.helper", SimpleNamespace(A16Wn=A16Wn))
    layer = TernaryLinear(256, 24, 128, "float16", True, False, torch.bfloat16)
    fill(layer)
    x = torch.randn(5, 256)
    assert layer.permutation is not None
    expected = x[:, layer.permutation.long().argsort()] @ layer.dequantize().float().T
    y = gemlite_product(layer)(x)
    assert (y - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("recipe", ["paper", "best"])
def test_random_ternary_layers_are_sound(recipe: str) -> None:
    model = random_network("tiny", 1, recipe, Compute())
    layers = [module for module in model.modules() if isinstance(module, TernaryLinear)]
    assert len(layers) == 7
    for layer in layers:
        assert layer.packed is not None
        require_base3(layer.stored()["trits"], layer.in_features)
        order = layer.matrix().permutation.long()
        assert torch.equal(order.sort().values, torch.arange(layer.in_features))
        assert layer.permuted == (recipe == "paper")
        alpha, mu = layer.matrix().grid()
        assert alpha.min() > 0
        assert 0 < mu.abs().max() < alpha.min()
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize(
    ("grid", "embedding", "most"), [("float16", 2, 2.03e9), ("int8", 2, 1.94e9), ("int8", 1, 1.68e9)]
)
def test_llama_7b_takes_as_little_as_is_said(grid: str, embedding: int, most: float) -> None:
    """Norms in 16 bits, embedding and head in so many bytes, and room for the headers of the files."""
    size = SHAPES["llama-7b"]
    hidden, intermediate, depth, vocabulary = size.hidden, size.intermediate, size.layers, size.vocabulary
    shapes = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    ternary = depth * sum(packed_bytes(n, m, 128, grid, True) for n, m in shapes)
    # A code takes a byte, and every row a float32.
    rest = 2 * vocabulary * (embedding * hidden + (4 if embedding == 1 else 0)) + 2 * (2 * depth + 1) * hidden
    assert 0.98 * most < ternary + rest + 1e6 < most


def test_fits_of_matrices_are_timed_by_every_recipe(
    tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "fits.json"
    assert run_main(benchmark_main, "fits", file, "--matrix", "8x48", "--backend", "cpu") == 0
    found = json.loads(file.read_text())["results"]["8x48"]
    assert found["seconds"].keys() == {"paper", "best"}
    ratio = found["seconds_of_paper_in_reference"] / found["seconds"]["paper"]
    assert found["paper_times_faster_than_reference"] == pytest.approx(ratio, rel=0.05)
    assert run_main(benchmark_main, "fits", "--matrix", "8by48") == EXIT_USAGE
    assert "must be ROWSxCOLUMNS" in capsys.readouterr().err


def test_a_busy_machine_is_compared_with_an_idle_one(
    tmp_path: Path, run_main: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is quantized here: the runs say how many processes there were, and what they were given."""
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    begun: list[SimpleNamespace] = []

    def popen(command: list[str]) -> SimpleNamespace:
        begun.append(process := SimpleNamespace(alive=True, wait=lambda: None))
        process.kill = lambda: setattr(process, "alive", False)
        return process

    def run(command: list[str], **rest: object) -> SimpleNamespace:
        assert command[5:] == ["--nsamples", "4", "--seqlen", "64"]
        busy = sum(process.alive for process in begun)
        results = {"seconds": 5.0 + busy, "cpu_seconds": 10.0 + busy}
        Path(command[4]).write_text(json.dumps({"results": results}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(busy, "subprocess", SimpleNamespace(Popen=popen, run=run, DEVNULL=None))
    file = tmp_path / "busy.json"
    assert run_main(benchmark_main, "busy", file, "--nsamples", "4", "--seqlen", "64") == 0
    result = json.loads(file.read_text())["results"]
    assert result["busy_processes"] == 6
    assert (result["alone"]["cpu_seconds"], result["busy"]["cpu_seconds"]) == (10.0, 16.0)
    assert result["cpu_ratio"] == 1.6
    assert not any(process.alive for process in begun)
