"""Compare mixtures of experts, made of slices of a dense model's MLPs, with the dense model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from harness.benchmark.few_tokens import few_token_errors
from harness.benchmark.slices import Slicing, require_sliceable, slice_mlps
from harness.comparison.measure import Comparison, read_by_label
from harness.comparison.methods import METHODS, Method
from harness.compute import default_compute
from harness.errors import UserError
from harness.models.decoder import locate_layers
from harness.models.loading import load_original
from harness.models.original import Original
from harness.perplexity import cut_windows
from harness.progress import Progress, Say, say_on_stderr, say_on_stdout
from harness.quantize.options import NO_EVALUATION, Options
from harness.quantize.prepare import read_texts

DENSE, FEW_TOKENS = "dense", "few-tokens"
# The mixtures, by the names of the command line.
MIXTURES = {
    "top-4": Slicing("4 slices, top 4", 4, 4),
    "halves-twice": Slicing("2 halves, each twice, top 2", 2, 2, twice=True),
    "top-2": Slicing("4 slices, top 2", 4, 2),
}
# Parts of the comparison, and what they are.
PARTS = {
    DENSE: "the dense model",
    **{key: slicing.words for key, slicing in MIXTURES.items()},
    FEW_TOKENS: "single experts fitted to few tokens, with and without average ones",
}
# What is run by default: methods of `METHODS`.
RUNS = ("pt2-llm", "best")

# Evaluation windows on which hidden states are compared.
WATCHED = 2

# Sums of slices differ from whole products by rounding: the largest difference of logits allowed in float32,
# over the largest logit.
ROUNDING = 1e-4


def compare_mixtures(
    options: Options,
    parts: list[str],
    methods: list[str],
    texts: list[str],
    save: Callable[[dict[str, Any]], None],
    earlier: dict[str, Any] | None = None,
    say: Say = say_on_stdout,
) -> dict[str, Any]:
    """Quantize a dense model and mixtures of its slices, and compare each with its own original.

    Parameters
    ----------
    options : Options
        Model and calibration, and the windows of the evaluation.
    parts : list of str
        Keys of `PARTS`.
    methods : list of str
        Keys of `METHODS`.
    texts : list of str
        Texts to measure on.
    save : callable
        Receives the results so far after every run: an interruption loses only one.
    earlier : dict, optional
        Results of an interrupted comparison with the same arguments; what they hold is not measured again.
    say : callable
        Prints a line for the user.

    Returns
    -------
    dict
        By model and method, what `_measured` returns; and the protocol.

    Raises
    ------
    UserError
        If the model cannot be sliced, or a mixture does not equal the original where it should.
    """
    streams = read_by_label(texts, options.text_column)
    dense = load_original(options.model, options.gguf_dtype, options.trust_remote_code)
    for name in parts:
        if name in MIXTURES:
            require_sliceable(dense.model.config, MIXTURES[name])
    results = earlier or {}
    if FEW_TOKENS in parts and FEW_TOKENS not in results:
        say("experts with few tokens")
        calibration = read_texts(replace(options, evaluation=NO_EVALUATION), say_on_stderr)[0]
        results[FEW_TOKENS] = few_token_errors(dense, calibration, next(iter(streams.values())), methods)
        save(results)
    found: dict[str, tuple[Original, str | None]] = {DENSE: (dense, options.model)}
    with TemporaryDirectory() as folder:
        for key, name in product(methods, [part for part in parts if part != FEW_TOKENS]):
            method, slicing = METHODS[key], MIXTURES.get(name)
            words = slicing.words if slicing else DENSE
            row = results.setdefault(words, {})
            if method.words in row:
                continue
            if slicing and name not in found:
                found[name] = _sliced(dense, slicing, Path(folder) / name)
            original, source = found[name]
            comparison = Comparison(replace(options, model=source), original, streams, default_compute())
            say(f"{words}: {method.words}")
            if not row:
                row["original"] = _original(comparison, dense, slicing)
                save(results)
            protocol = results.setdefault("protocol", {})
            row[method.words] = _measured(comparison, method, Path(folder) / "out", protocol)
            _compare_with_dense(results)
            save(results)
            say(f"  {row[method.words]}")
    _compare_with_dense(results)
    return results


def _sliced(dense: Original, slicing: Slicing, folder: Path) -> tuple[Original, str]:
    """Write a mixture to a folder, and read it back."""
    slice_mlps(dense.model, slicing).save_pretrained(folder)
    dense.tokenizer.save_pretrained(folder)
    return load_original(str(folder)), str(folder)


def _original(comparison: Comparison, dense: Original, slicing: Slicing | None) -> dict[str, Any]:
    """Measure a model before its quantization; refuse one that should equal the dense model and does not."""
    found: dict[str, Any] = {}
    if slicing is not None and slicing.is_whole:
        stream = next(iter(comparison.streams.values()))
        windows = cut_windows(dense, stream, comparison.options.evaluation_seqlen, 1)[0]
        difference = logit_difference(dense, comparison.original, windows[0])
        found["largest_difference_of_logits"] = difference
        if difference > ROUNDING:
            raise UserError(f"{slicing.words}: logits differ from the dense model's by {difference:.1e}")
    found["texts"] = {
        label: {"perplexity": perplexity.value, "protocol": perplexity.protocol}
        for label, perplexity in comparison.perplexities().items()
    }
    return found


@torch.no_grad()
def logit_difference(first: Original, second: Original, window: torch.Tensor) -> float:
    """Largest difference of two models' logits in float32 over the largest logit of the first."""
    logits = [deepcopy(one.model).float()(window[None], use_cache=False).logits for one in (first, second)]
    return float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())


def _measured(
    comparison: Comparison, method: Method, folder: Path, protocol: dict[str, Any]
) -> dict[str, Any]:
    """Quantize a model and compare it with its original."""
    record, quantized = comparison.quantize(method, folder)
    calibration, original = record["calibration"], comparison.original
    protocol["calibration"] = {name: calibration[name] for name in ("text", "nsamples", "seqlen", "seed")}
    stream = next(iter(comparison.streams.values()))
    windows = cut_windows(original, stream, comparison.options.evaluation_seqlen, WATCHED)[0]
    on_texts = {
        label: {"perplexity": perplexity.value, **asdict(divergence)}
        for label, (perplexity, divergence) in comparison.divergences(quantized).items()
    }
    return {
        "bits_per_weight": round(record["bits_per_weight"], 3),
        "mean_relative_output_error": record["mean_relative_output_error"],
        **output_errors(original.model, quantized.model, windows),
        "variance_in_blocks": variance_in_blocks(record["layers"]),
        "texts": on_texts,
        "seconds_of_layers": round(record["seconds"]["layers"], 1),
    }


@torch.no_grad()
def output_errors(original: Any, quantized: Any, windows: torch.Tensor) -> dict[str, float]:
    """Squared relative errors of MLPs' outputs and of the final hidden states, medians over tokens.

    Parameters
    ----------
    original, quantized : transformers.PreTrainedModel
        The models.
    windows : (count, seqlen) int64 tensor
        Token ids.

    Returns
    -------
    dict
        ``mlp_error``: of each MLP's output on the inputs that it has in the original model, mean over layers.
        ``hidden_error``: of the final hidden states, after the last norm.
    """
    before, after = (locate_layers(model).layers for model in (original, quantized))
    mlps = [[_mlp(layer) for layer in layers] for layers in (before, after)]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    mlp_errors: list[list[torch.Tensor]] = [[] for _ in before]
    hidden_errors = []
    with ExitStack() as hooks, Progress("output errors", len(windows), "window", say_on_stderr) as step:
        for mlp in mlps[0]:
            hook = mlp.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
            hooks.callback(hook.remove)
        for window in windows:
            expected = _final_states(original, window)
            pairs = list(seen)
            hidden_errors.append(_relative(expected, _final_states(quantized, window)))
            for errors, mlp, (x, y) in zip(mlp_errors, mlps[1], pairs, strict=True):
                errors.append(_relative(y, mlp(x)))
            seen.clear()
            step()
    medians = [float(torch.cat(errors).median()) for errors in mlp_errors]
    return {
        "mlp_error": sum(medians) / len(medians),
        "hidden_error": float(torch.cat(hidden_errors).median()),
    }


def _final_states(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Hidden states of a window that enter the head, after the final norm."""
    return model.base_model(window[None], use_cache=False).last_hidden_state


def _mlp(layer: nn.Module) -> nn.Module:
    """The MLP of a decoder layer, dense or of experts."""
    return layer.get_submodule("block_sparse_moe" if hasattr(layer, "block_sparse_moe") else "mlp")


def _relative(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """Squared relative error of every token, (tokens,)."""
    expected, got = (states.float().flatten(0, -2) for states in (expected, got))
    return (expected - got).square().sum(1) / expected.square().sum(1)


def variance_in_blocks(layers: list[dict[str, Any]]) -> float:
    """Variance of the MLPs' weights within blocks, in the order of quantization over that in their own.

    The mean over matrices, from the rows of a report's layers.
    """
    ratios = [
        row["variance_after"] / row["variance_before"]
        for layer in layers
        for row in layer["matrices"]
        if "self_attn" not in row["name"] and row["variance_before"]
    ]
    return sum(ratios) / len(ratios)


def _compare_with_dense(results: dict[str, Any]) -> None:
    """Add to every run of a mixture its errors over those of the dense model by the same method."""
    for slicing in MIXTURES.values():
        for method, found in results.get(slicing.words, {}).items():
            base = results.get(DENSE, {}).get(method)
            if method == "original" or base is None:
                continue
            names = ("mean_relative_output_error", "mlp_error", "hidden_error")
            pairs = {name: (found[name], base[name]) for name in names}
            for label, on_text in found["texts"].items():
                other = base["texts"][label]
                pairs[f"{label}: KL divergence"] = on_text["mean"], other["mean"]
                pairs[f"{label}: perplexity"] = on_text["perplexity"], other["perplexity"]
            found["over_dense"] = {name: round(a / b, 4) for name, (a, b) in pairs.items() if b}
