"""A whole quantization run: from names of model and text to a checkpoint and its report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from harness import text
from harness.backends import load_backend
from harness.calibration import gram
from harness.calibration.layerwise import pass_again, quantize_layers
from harness.calibration.methods import FitError, Method, baseline, baseline_bits, ternarizer
from harness.compute import compute_for, dtype_name
from harness.errors import UserError
from harness.files import write_json
from harness.hf import load
from harness.machine import duration, environment, peak_memory
from harness.models.decoder import DecoderLayers
from harness.models.folder import REPORT, WEIGHT_FILES, require_free, unfinished
from harness.models.original import Original
from harness.perplexity import measure_on
from harness.quantize import resume
from harness.quantize.options import PT2_LLM, Options
from harness.quantize.prepare import (
    Ready,
    announcement,
    fitting_backend,
    prepare,
    read_texts,
    require_other_folder,
    with_all_windows,
)
from harness.quantize.report import layer_record, mean_layer_error, table
from harness.ternary.embedding import unrounded
from harness.ternary.writing import CheckpointWriter


def quantize(options: Options, say: Callable[[str], None] = tqdm.write) -> dict[str, Any]:
    """Quantize a model, write the checkpoint, and measure perplexity before and after.

    Parameters
    ----------
    options : Options
        What to do.
    say : callable
        Takes every line meant for the user.

    Returns
    -------
    dict
        What report.json holds.

    Raises
    ------
    UserError
        If the input cannot be used; before any long work where that can be known before.
    """
    if options.out is None and options.method == PT2_LLM:
        raise UserError("--out DIR is missing: where should the checkpoint go?")
    if options.resume and options.method != PT2_LLM:
        raise UserError(f"{options.method} writes nothing that could be gone on with; leave out --resume")
    earlier = None
    if options.out is not None:
        require_free(options.out, options.force, options.resume)
        require_other_folder(options, options.out)
        earlier = unfinished(options.out) if options.resume else None
        if options.resume and earlier is None:
            say(f"{options.out} holds no run that was stopped: beginning with the first layer")
    backend = load_backend(options.backend)
    if backend.note:
        say(backend.note)
    if options.config.aga == "printed" and "aga.align_grid_printed" in backend.refused:
        raise UserError(f"backend {backend.name} leaves out Eq. 13 as printed; use --backend reference")
    calibration_text, evaluation_text = read_texts(options)

    compute = compute_for(backend)
    begin = time.perf_counter()
    ready = prepare(options, backend, compute, calibration_text, evaluation_text)
    for line in announcement(options, ready, calibration_text):
        say(line)
    ready = with_all_windows(ready)
    record = _record(options, ready, calibration_text)
    if earlier is not None and options.out is not None:
        resume.continued(record, earlier, options.out)
    _add_seconds(record, "load", begin)

    def evaluate(when: str, model: Original) -> None:
        if evaluation_text is not None:
            begin = time.perf_counter()
            windows = options.evaluation_windows
            record["perplexity"][when] = asdict(
                measure_on(model, evaluation_text, options.evaluation_seqlen, windows, compute)
            )
            _add_seconds(record, f"perplexity {when}", begin)

    if options.measure_original and "before" not in record["perplexity"]:
        with unrounded(ready.coded):
            evaluate("before", ready.original)
    if options.method == PT2_LLM and options.out is not None:
        _ternarize(options, options.out, ready, record, say)
        tokenizer, streamed = ready.original.tokenizer, ready.original.read is not None
        del ready  # two models need not fit side by side
        # Dequantized, a model that was too large for the memory would be so again.
        loaded = load(options.out, dense=not streamed, trust_remote_code=options.trust_remote_code)
        evaluate("after", Original(loaded, tokenizer, str(options.out)))
    else:
        method = baseline(options.method, options.config)
        _run_layers(options, ready, method, record, say)
        evaluate("after", ready.original)
    record["peak_memory_bytes"] = peak_memory()
    record["peak_device_bytes"] = compute.peak_memory()
    for line in _result_lines(options, record):
        say(line)
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            write_json(options.out / REPORT, record)
        except OSError as error:
            whole = "; the checkpoint is whole, its report lacks the perplexity"
            raise UserError(
                f"{options.out / REPORT} could not be written: {error.strerror}"
                + (whole if options.method == PT2_LLM else "")
            ) from None
    return record


def _ternarize(
    options: Options,
    out: Path,
    ready: Ready,
    record: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Ternarize the model and write the checkpoint layer by layer."""
    method = ternarizer(ready.backend, ready.compute, options.config)
    count = len(ready.decoder.layers)
    with CheckpointWriter(out, count + 1, ready.backend, done=len(record["layers"])) as writer:
        try:
            _run_layers(options, ready, method, record, say, writer)
            writer.add(_outside_layers(ready))
            modules = list(ready.decoder.named_linears())
            writer.finish(ready.original, options.config, modules, list(ready.coded), record)
        except FitError:
            writer.forget()  # it would fail again
            raise
        except BaseException:
            kept = unfinished(out)
            if kept is not None and len(kept["layers"]) > writer.done:
                layers = len(kept["layers"])
                say(f"{layers} of {count} layers are kept: the same command with --resume goes on from there")
            raise


def _run_layers(
    options: Options,
    ready: Ready,
    method: Method,
    record: dict[str, Any],
    say: Callable[[str], None],
    writer: CheckpointWriter | None = None,
) -> None:
    """Quantize every layer with a progress bar, write it, and say and record its figures."""
    begin = time.perf_counter()
    layers: list[dict[str, Any]] = record["layers"]
    count = len(ready.decoder.layers)
    with tqdm(total=count, disable=None, leave=False, bar_format=_BAR) as bar:
        if writer is not None and 0 < len(layers) < count:
            say(f"{len(layers)} of {count} layers are there; what they make of the text is computed again")
            for _ in _pass_again(options, ready, layers, writer):
                bar.update()

        def progress(steps: int, stage: str) -> None:
            bar.set_postfix_str(stage, refresh=False)
            # Two passes of every window make a layer; those that true-sequential adds do not count.
            bar.update(min(steps / (2 * len(ready.hidden)), max(len(layers) + 1 - bar.n, 0)))

        for layer in quantize_layers(
            ready.decoder,
            ready.hidden,
            ready.calls,
            method,
            ready.compute,
            first=len(layers),
            true_sequential=options.true_sequential,
            progress=progress,
        ):
            index = len(layers)
            if writer is not None:
                results = {matrix.name: matrix.result for matrix in layer.matrices}
                writer.add(_unpacked_tensors(ready.decoder, index), results)
            checksum = resume.checksum(ready.hidden)
            layers.append({**layer_record(index, layer), "outputs_checksum": checksum})
            begin = _add_seconds(record, "layers", begin)
            if writer is not None:
                writer.note(record)
            bar.update(len(layers) - bar.n)
            say(
                f"layer {len(layers):3d}/{count}  {len(layer.matrices)} matrices  "
                f"relative output error {layers[-1]['relative_output_error']:.4f}  "
                f"{sum(layer.seconds.values()):.1f} s"
            )
            for matrix in layers[-1]["matrices"]:
                if matrix.get("damping", 0.0) > options.config.damping:
                    say(f"  warning: {matrix['name']}: damping raised to {matrix['damping']:g}")
            del layer  # or its float64 matrices would live beside those of the next
    record["mean_relative_output_error"] = mean_layer_error(layers)
    _add_seconds(record, "layers", begin)


def _pass_again(
    options: Options, ready: Ready, layers: list[dict[str, Any]], writer: CheckpointWriter
) -> Iterator[None]:
    """Take the hidden states through the layers of a run that was stopped."""
    weights = (
        resume.stored_weights(
            writer.shard(index + 1), ready.decoder, index, options.config, ready.compute.device
        )
        for index in range(len(layers))
    )
    passes = pass_again(ready.decoder, ready.hidden, ready.calls, weights, ready.compute)
    for index, _ in enumerate(passes):
        if resume.checksum(ready.hidden) != layers[index]["outputs_checksum"]:
            raise UserError(
                f"layer {index + 1} does not give what it gave when it was ternarized, so this machine "
                "(its number of threads, say) is not the same; go on where the run was, or begin anew with "
                "--force"
            )
        yield


def _add_seconds(record: dict[str, Any], stage: str, begin: float) -> float:
    """Add the time since `begin` to that of a stage; returns the time now."""
    now = time.perf_counter()
    record["seconds"][stage] = record["seconds"].get(stage, 0.0) + now - begin
    return now


_BAR = "{percentage:3.0f}% |{bar}| {n:.1f}/{total} layers [{elapsed}<{remaining}, {postfix}]"


def _unpacked_tensors(decoder: DecoderLayers, index: int) -> dict[str, torch.Tensor]:
    """What a decoder layer stores as it was: biases and norms."""
    packed = {f"{name}.weight" for name in decoder.linears[index]}
    names = [name for name in decoder.layers[index].state_dict() if name not in packed]
    return {decoder.full_name(index, name): tensor for name, tensor in decoder.tensors(index, names).items()}


def _outside_layers(ready: Ready) -> dict[str, torch.Tensor]:
    """What is outside the decoder layers, without the tensors that are tied to another."""
    model = ready.original.model
    tied = getattr(model, "all_tied_weights_keys", {})
    tensors = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(f"{ready.decoder.prefix}.") and name not in tied
    }
    for module, matrix in ready.coded.items():
        tensors |= {f"{module}.{part}": tensor for part, tensor in matrix.parts.items()}
    return tensors


def _record(options: Options, ready: Ready, calibration_text: text.Text) -> dict[str, Any]:
    """What is known of a run before its first layer."""
    layers_in = ready.compute.dtype or ready.original.model.dtype
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": ready.original.name,
        "dtype": dtype_name(ready.original.model.dtype),
        "method": options.method,
        **_of_method(options, ready),
        "options": {name: value for name, value in asdict(options).items() if name != "config"},
        "calibration": {
            "text": calibration_text.protocol,
            "tokens": ready.tokens,
            "nsamples": options.nsamples,
            "seqlen": options.seqlen,
            "seed": options.config.seed,
            "true_sequential": options.true_sequential,
            "computed_in": dtype_name(layers_in),
            "activations_kept_in": dtype_name(ready.hidden[0].dtype),
            "gram": gram.SUMS,
            "inputs_checksum": resume.checksum(ready.hidden),
        },
        **environment(),
        "device": ready.compute.describe(),
        "perplexity": {},
        "seconds": {},
        "layers": [],
        "resumed_after": [],
    }


def _of_method(options: Options, ready: Ready) -> dict[str, Any]:
    """What computes the matrices, with which settings, and what comes of it."""
    config = asdict(options.config)
    backend = {"backend": fitting_backend(options, ready)}
    if options.method == PT2_LLM:
        bits = ready.plan.bits_per_weight
        return {**backend, "config": config, "plan": asdict(ready.plan), "bits_per_weight": bits}
    used = {name: config[name] for name in ("block_size", "damping")}
    return {**backend, "config": used, "bits_per_weight": baseline_bits(options.config)}


def _result_lines(options: Options, record: dict[str, Any]) -> list[str]:
    lines = ["", *table(record["layers"]), ""]
    lines.append(f"mean relative output error of the layers {record['mean_relative_output_error']:.4f}")
    if not record["perplexity"]:
        lines.append("perplexity not measured: name a text with --eval")
    for when, result in record["perplexity"].items():
        lines.append(f"perplexity {when:6} {result['value']:.4g}   {result['protocol']}")
    if options.method == PT2_LLM and options.out is not None:
        weights = [file for pattern in WEIGHT_FILES for file in options.out.glob(pattern)]
        size = sum(file.stat().st_size for file in weights)
        lines.append(f"{options.out}: {size / 1e6:.1f} MB of weights")
    seconds = sum(record["seconds"].values())
    device = record["peak_device_bytes"]
    lines.append(
        f"{duration(seconds)}, peak memory {record['peak_memory_bytes'] / 1e9:.1f} GB"
        + (f", of the device {device / 1e9:.1f} GB" if device else "")
    )
    return lines
