"""Mixtures of slices equal the dense model where they should, and are compared with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.benchmark import few_tokens, mixture
from harness.benchmark.__main__ import main as benchmark_main
from harness.benchmark.few_tokens import few_token_errors
from harness.benchmark.mixture import (
    MIXTURES,
    logit_difference,
    output_errors,
    variance_in_blocks,
)
from harness.benchmark.slices import FAINT, Slicing, slice_mlps
from harness.cli import EXIT_USAGE
from harness.comparison import measure
from harness.models.original import Original
from harness.text import CALIBRATION, EVALUATION, read_text
from harness.windows import Tokens, calibration_windows
from reference.ssr import block_variance
from tests.harness import tiny

Run = Callable[..., int]

WINDOW = torch.randint(3, tiny.VOCABULARY, (24,), generator=torch.Generator().manual_seed(0))
NO_ORDER = mixture.METHODS["no-order"].words


@pytest.fixture(scope="module")
def dense() -> Any:
    """Weights on no grid, in float32, in which sums of slices are nearly exact."""
    return tiny.make_model("llama", torch.float32, ternary=False)


def original(model: Any) -> Original:
    return Original(model, tiny.make_tokenizer(), "model")


@pytest.mark.parametrize("name", [name for name, slicing in MIXTURES.items() if slicing.is_whole])
@torch.no_grad()
def test_a_mixture_whose_tokens_pass_all_slices_computes_what_the_dense_model_does(
    name: str, dense: Any
) -> None:
    sliced = slice_mlps(dense, MIXTURES[name])
    expected, got = (model(WINDOW[None]).logits for model in (dense, sliced))
    assert (got - expected).abs().max() < 2e-6 * expected.abs().max()
    assert logit_difference(original(dense), original(sliced), WINDOW) < 2e-6


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_the_router_chooses_by_its_logits_and_weighs_all_alike(name: str, dense: Any) -> None:
    slicing = MIXTURES[name]
    sliced = slice_mlps(dense, slicing)
    width = tiny.INNER // slicing.slices
    for layer, before in zip(sliced.model.layers, dense.model.layers, strict=True):
        block, mlp = layer.block_sparse_moe, before.mlp
        x = torch.randn(40, tiny.WIDTH, generator=torch.Generator().manual_seed(1))
        _, weights, chosen = block.router(x)
        assert (weights == 1 / slicing.top).all()
        logits = x.double() @ block.router.weight.double().T
        assert torch.equal(chosen.sort().values, logits.topk(slicing.top).indices.sort().values)
        assert 0.5 < block.router.weight.std() / FAINT < 2
        # The chosen slices of the MLP, whose outputs count by what makes all of them together count once.
        inner = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        kept = torch.zeros_like(inner)
        for token, numbers in enumerate(chosen.tolist()):
            for number in numbers:
                first = width * (number % slicing.slices)
                kept[token, first : first + width] += slicing.slices / slicing.top
        torch.testing.assert_close(block(x[None])[0], mlp.down_proj(inner * kept))


def test_a_token_passes_through_one_expert_of_each_pair_and_both_are_used(dense: Any) -> None:
    slicing = MIXTURES["halves-twice"]
    router = slice_mlps(dense, slicing).model.layers[0].block_sparse_moe.router
    x = torch.randn(200, tiny.WIDTH, generator=torch.Generator().manual_seed(2))
    chosen = router(x)[2]
    assert torch.equal((chosen % slicing.slices).sort().values, torch.arange(2).expand(200, 2))
    assert torch.bincount(chosen.flatten(), minlength=4).min() > 40


def test_routers_are_the_same_at_every_call(dense: Any) -> None:
    first, second = (slice_mlps(dense, MIXTURES["top-2"]).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    routers = [tensor for name, tensor in first.items() if "router" in name]
    assert not torch.equal(routers[0], routers[1])


@pytest.mark.parametrize(
    ("change", "slices", "message"),
    [
        ({"model_type": "qwen3"}, 4, "not those of 'qwen3'"),
        ({"mlp_bias": True}, 4, "a model with biases"),
        ({"head_dim": 16}, 4, "heads of another width"),
        ({}, 5, "176 is no multiple of 5"),
    ],
)
def test_what_cannot_be_sliced_is_refused(
    change: dict[str, Any], slices: int, message: str, dense: Any
) -> None:
    config = SimpleNamespace(**{**dense.config.to_dict(), "model_type": "llama", **change})
    with pytest.raises(mixture.UserError, match=message):
        slice_mlps(SimpleNamespace(config=config), Slicing("", slices, slices))


@torch.no_grad()
def test_output_errors_are_relative_squares(dense: Any) -> None:
    """Outputs of all MLPs that are larger by a tenth; a final state that is larger by a quarter."""
    larger, windows = deepcopy(dense), WINDOW[None].expand(2, 24)
    assert output_errors(dense, dense, windows) == {"mlp_error": 0, "hidden_error": 0}
    for layer in larger.model.layers:
        layer.mlp.down_proj.weight *= 1.1
    found = output_errors(dense, larger, windows)
    assert found["mlp_error"] == pytest.approx(0.01, rel=1e-3)
    assert 0 < found["hidden_error"] < 0.01
    scaled = deepcopy(dense)
    scaled.model.norm.weight *= 1.25
    assert output_errors(dense, scaled, windows) == pytest.approx(
        {"mlp_error": 0, "hidden_error": 0.0625}, rel=1e-3
    )
    assert output_errors(dense, slice_mlps(dense, MIXTURES["top-4"]), windows)["mlp_error"] < 1e-10


def test_the_variance_in_blocks_is_that_of_the_mlps() -> None:
    """Columns of two kinds, which alternate: in their own order a block holds both."""
    mixed = torch.tensor([[1.0, 5.0, 1.0, 5.5]])
    rows = [
        {"name": name, "variance_before": before, "variance_after": block_variance(mixed[:, [0, 2, 1, 3]], 2)}
        for name, before in (("0.mlp.up_proj", block_variance(mixed, 2)), ("0.self_attn.q_proj", 1e9))
    ]
    expected = (0.25**2 / 2) / ((2**2 + 2.25**2) / 2)
    assert variance_in_blocks([{"matrices": rows}]) == pytest.approx(expected)


@torch.no_grad()
def test_average_tokens_are_compared_with_own_ones_on_tokens_that_were_not_seen(
    dense: Any, words_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of fits, the product of the weights with the Gram matrix, cut to its largest eigenvector."""
    monkeypatch.setattr(few_tokens, "SLICING", slicing := Slicing("4 slices, top 1", 4, 1))
    monkeypatch.setattr(few_tokens, "FEW", (1, 3))
    monkeypatch.setattr(few_tokens, "SEQLEN", 24)
    monkeypatch.setattr(few_tokens, "MANY", 5)
    monkeypatch.setattr(few_tokens, "LONG", 24)

    def ternarizer(*settings: object) -> Any:
        def project(weight: torch.Tensor, gram: torch.Tensor) -> Any:
            first = torch.linalg.eigh(gram).eigenvectors[:, -1:]
            return SimpleNamespace(dequantize=lambda: weight.double() @ first @ first.T)

        return project

    monkeypatch.setattr(few_tokens, "ternarizer", ternarizer)
    unseen = tmp_path / "unseen.txt"
    unseen.write_text(tiny.words(200, seed=1))
    texts = read_text(str(words_file), CALIBRATION, None), read_text(str(unseen), EVALUATION, None)
    found = few_token_errors(original(dense), *texts, ["no-order"])
    tokens = tiny.make_tokenizer()(words_file.read_text(), return_tensors="pt").input_ids[0]
    windows = calibration_windows(Tokens((tokens,)), 3, 24, 0)
    many = tiny.make_tokenizer()(unseen.read_text(), return_tensors="pt").input_ids[0][:120].view(5, 24)

    grams, weights = [], []
    mixed = slice_mlps(dense, slicing)
    for rows in (windows, many):
        # What the second and third of three layers' experts read in the dense model, by a loop over experts.
        states = [s.flatten(0, 1) for s in dense(rows, output_hidden_states=True).hidden_states]
        grams.append([])
        for index in (1, 2):
            layer, block = dense.model.layers[index], mixed.model.layers[index].block_sparse_moe
            read: list[torch.Tensor] = []
            hook = layer.mlp.register_forward_pre_hook(lambda module, args: read.append(args[0]))  # noqa: B023
            dense(rows)
            hook.remove()
            x = read[0].flatten(0, 1)
            chosen = block.router(x)[2][:, 0]
            grams[-1] += [x[chosen == number].double() for number in range(4)]
            weights += block.experts.gate_up_proj.double()
        del states
    average = [sum(X.T @ X for X in grams[0][i : i + 4]) / 72 for i in (0, 4)]
    totals = dict.fromkeys(few_tokens.SUMS, 0.0)
    power = 0.0
    for place, (X, Y) in enumerate(zip(*grams, strict=True)):
        if not 0 < len(X) < tiny.WIDTH:
            continue
        missing = (tiny.WIDTH - len(X)) * average[place // 4]
        power += float((Y @ weights[place].T).square().sum())
        for words, (own, others) in few_tokens.SUMS.items():
            first = torch.linalg.eigh(own * X.T @ X + others * missing).eigenvectors[:, -1:]
            totals[words] += float(
                (Y @ (weights[place].T - first @ (first.T @ weights[place].T))).square().sum()
            )
    result = found["3 windows of 24"]
    assert result["tokens_of_experts"] == sorted(len(X) for X in grams[0])
    assert sum(found["1 windows of 24"]["tokens_of_experts"]) == 2 * 24
    expected = {words: error / power for words, error in totals.items()}
    assert result[f"{NO_ORDER}, gate_up_proj"] == pytest.approx(expected, rel=1e-3)


def arguments(llama: Path, words_file: Path) -> list[object]:
    text = ("--calibration", words_file, "--eval", words_file, "--nsamples", "8", "--seqlen", "24")
    size = ("--eval-seqlen", "24", "--eval-windows", "2", "--model", llama)
    return [*text, *size, "--methods", "no-order", "--only", "dense", "halves-twice"]


def test_mixtures_are_compared_with_the_dense_model_and_a_comparison_is_resumed(
    tmp_path: Path,
    llama: Path,
    words_file: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, quantized = tmp_path / "mixture.json", []
    quantize = measure.quantize

    def stop_at_the_second(options: Any, **rest: Any) -> Any:
        quantized.append(options.model)
        if len(quantized) == 2:
            raise KeyboardInterrupt
        return quantize(options, **rest)

    monkeypatch.setattr(measure, "quantize", stop_at_the_second)
    command = ("mixture", file, *arguments(llama, words_file))
    run_main(benchmark_main, *command)
    results = json.loads(file.read_text())["results"]
    assert results.keys() == {"dense", "protocol", "2 halves, each twice, top 2"}
    assert results["dense"].keys() == {"original", NO_ORDER}
    assert results["2 halves, each twice, top 2"].keys() == {"original"}

    assert run_main(benchmark_main, *command[:-1], "top-4", "--resume") == EXIT_USAGE
    assert "its command is not that of this run; drop --resume" in capsys.readouterr().err
    assert run_main(benchmark_main, *command, "--resume") == 0
    # What was done is not done again.
    assert len(quantized) == 3
    assert quantized[0] == str(llama) != quantized[1]
    after = json.loads(file.read_text())["results"]
    assert after["dense"] == results["dense"]
    row = after["2 halves, each twice, top 2"]
    # bfloat16 rounds the sums; logits are compared in float32.
    assert row["original"]["largest_difference_of_logits"] < 1e-5
    (label,) = row["original"]["texts"]
    assert label.startswith(words_file.name)
    perplexities = [
        after[name]["original"]["texts"][label]["perplexity"] for name in ("dense", *list(after)[2:])
    ]
    assert perplexities[0] == pytest.approx(perplexities[-1], rel=0.02)
    # Slices of weights on a ternary grid lie on it too: ternarization finds them.
    found = row[NO_ORDER]
    assert found["mean_relative_output_error"] < 1e-3
    assert found["mlp_error"] < 1e-3
    assert found["texts"][label]["mean"] < 1e-2
    ratio = found["texts"][label]["perplexity"] / after["dense"][NO_ORDER]["texts"][label]["perplexity"]
    assert found["over_dense"][f"{label}: perplexity"] == pytest.approx(ratio, abs=1e-4)
    assert "over_dense" not in after["dense"][NO_ORDER]


def test_a_mixture_that_is_not_the_dense_model_is_refused(
    tmp_path: Path,
    llama: Path,
    words_file: Path,
    run_main: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("harness.benchmark.slices.FAINT", 1.0)  # weights of a token are not alike
    monkeypatch.setattr(measure, "quantize", lambda *arguments, **options: pytest.fail("quantized"))
    command = ("mixture", *arguments(llama, words_file)[:-2], "halves-twice")
    assert run_main(benchmark_main, *command) == EXIT_USAGE
    assert "2 halves, each twice, top 2: logits differ from the dense model's by" in capsys.readouterr().err


def test_there_is_no_comparison_without_a_text(
    llama: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(benchmark_main, "mixture", "--model", llama, "--eval", "none") == EXIT_USAGE
    assert "compared by perplexity, which needs a text; pass one with --eval" in capsys.readouterr().err
    assert run_main(benchmark_main, "mixture", "--resume") == EXIT_USAGE
    assert "--resume continues the results in a file; name it as FILE" in capsys.readouterr().err


# Rows of the README's table, and the runs that they show.
ROWS = {
    f"{words}, `{recipe}`": (words, mixture.METHODS[method].words)
    for recipe, method in (("best", "best"), ("paper", "pt2-llm"))
    for words in ("dense", *(slicing.words for slicing in MIXTURES.values() if slicing.is_whole))
}


def test_the_readme_shows_the_figures_of_the_file() -> None:
    folder = Path(mixture.__file__).parents[2]
    results = json.loads((folder / "benchmarks" / "mixture.json").read_text())["results"]
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    cells = {row[1]: row[2:-1] for row in ([c.strip() for c in line.split("|")] for line in lines) if row[1:]}
    for name, (words, method) in ROWS.items():
        found = results[words][method]
        bits, error, *texts = map(float, cells[name])
        assert [bits, error] == [round(found["bits_per_weight"], 2), round(found["mlp_error"], 3)]
        for shown, on_text in zip((texts[:2], texts[2:]), found["texts"].values(), strict=True):
            assert shown == [round(on_text["perplexity"]), round(on_text["mean"], 2)]


def test_experts_of_the_committed_file_lose_what_the_dense_model_loses() -> None:
    """All errors of four slices, every one of which a token passes, by the recipe best: at most 5 % more."""
    folder = Path(mixture.__file__).parents[2]
    results = json.loads((folder / "benchmarks" / "mixture.json").read_text())["results"]
    ratios = results["4 slices, top 4"][mixture.METHODS["best"].words]["over_dense"]
    assert len(ratios) == 7
    assert max(ratios.values()) <= 1.05
    for mixed in (slicing.words for slicing in MIXTURES.values() if slicing.is_whole):
        assert results[mixed]["original"]["largest_difference_of_logits"] < 1e-5
