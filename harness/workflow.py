"""A whole quantization run: from names of model and text to a checkpoint and its report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from harness import checkpoint, gram, report, text, writing
from harness.backends import Backend, load_backend
from harness.capture import LayerCall, capture_inputs
from harness.cli import UserError
from harness.compute import Compute, compute_for, dtype_name, host_memory
from harness.embedding import CodedMatrix, round_embeddings, unrounded
from harness.evaluate import measure_on
from harness.hf import load
from harness.layers import DecoderLayers, find_decoder_layers
from harness.models import Original, load_original, require_fits
from harness.pipeline import FittedMatrix, Method, baseline, quantize_layers, ternarizer
from harness.plan import Plan, duration, make_plan
from reference.types import TernaryConfig

PT2_LLM = "pt2-llm"
NO_EVALUATION = "none"
AS_IT_IS, INT8 = "as-it-is", "int8"


@dataclass(frozen=True)
class Options:
    """What a run is asked for; the command line of `harness.quantize` explains the fields.

    `measure_original` is for runs that follow others on the same model.
    """

    model: str | None = None
    out: Path | None = None
    force: bool = False
    backend: str = "auto"
    embedding: str = AS_IT_IS
    gguf_dtype: str = "bfloat16"
    trust_remote_code: bool = False
    calibration: str | None = None
    text_column: str | None = None
    nsamples: int = 128
    seqlen: int = 2048
    true_sequential: bool = False
    method: str = PT2_LLM
    config: TernaryConfig = field(default_factory=TernaryConfig)
    evaluation: str | None = None
    evaluation_seqlen: int = 2048
    evaluation_windows: int | None = None
    measure_original: bool = True


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
    if options.out is not None:
        writing.require_free(options.out, options.force)
        _require_other_folder(options, options.out)
    backend = load_backend(options.backend)
    if backend.note:
        say(backend.note)
    if options.config.aga == "printed" and "aga.align_grid_printed" in backend.refused:
        raise UserError(f"backend {backend.name} leaves out Eq. 13 as printed; use --backend reference")
    calibration_text, evaluation_text = _texts(options)

    compute = compute_for(backend)
    begin = time.perf_counter()
    with compute.explaining_lack_of_memory():
        ready = _prepare(options, backend, compute, calibration_text, evaluation_text)
        for line in _announcement(options, ready, calibration_text):
            say(line)
        ready = _with_all_windows(ready)
    record = _record(options, ready, calibration_text)
    record["seconds"]["load"] = time.perf_counter() - begin

    def evaluate(when: str, model: Original) -> None:
        if evaluation_text is not None:
            begin = time.perf_counter()
            windows = options.evaluation_windows
            record["perplexity"][when] = asdict(
                measure_on(model, evaluation_text, options.evaluation_seqlen, windows, compute)
            )
            record["seconds"][f"perplexity {when}"] = time.perf_counter() - begin

    if options.measure_original:
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
        _run_layers(options, ready, method, lambda index, matrices: None, record, say)
        evaluate("after", ready.original)
    record["peak_memory_bytes"] = report.peak_memory()
    record["peak_device_bytes"] = compute.peak_memory()
    for line in _result_lines(options, record):
        say(line)
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            writing.write_json(options.out / checkpoint.REPORT, record)
        except OSError as error:
            whole = "; the checkpoint is whole, its report lacks the perplexity"
            raise UserError(
                f"{options.out / checkpoint.REPORT} could not be written: {error.strerror}"
                + (whole if options.method == PT2_LLM else "")
            ) from None
    return record


@dataclass(frozen=True)
class _Ready:
    """A model and its calibration inputs; `tokens` is the length of the whole calibration text.

    Hidden states are those of the first window until `_with_all_windows`.
    """

    original: Original
    decoder: DecoderLayers
    backend: Backend
    compute: Compute
    tokens: int
    windows: torch.Tensor
    hidden: list[torch.Tensor]
    calls: list[LayerCall]
    plan: Plan
    coded: dict[str, CodedMatrix]


def _require_other_folder(options: Options, out: Path) -> None:
    """Refuse to write over what is read, and to put a baseline's report over a checkpoint's."""
    source = Path(options.model).resolve() if options.model is not None else None
    if source is not None and out.resolve() in (source, source.parent if source.is_file() else source):
        raise UserError(f"{out} is where the original model lies; choose another --out")
    if options.method != PT2_LLM and checkpoint.is_ternary(out):
        raise UserError(f"{out} holds a checkpoint, and a baseline gives none; choose another --out")


def _prepare(
    options: Options,
    backend: Backend,
    compute: Compute,
    calibration_text: text.Text,
    evaluation_text: text.Text | None,
) -> _Ready:
    """Everything that can fail early: load, look for what to quantize, cut windows, look for space."""
    original = load_original(options.model, options.gguf_dtype, options.trust_remote_code)
    if original.read is not None and options.method != PT2_LLM:
        raise UserError(f"{options.method} needs the whole model in memory, and {original.name} is too large")
    decoder = find_decoder_layers(original.model, original.read)
    tokens = text.tokenize(calibration_text, original.tokenizer)
    windows = text.calibration_windows(tokens, options.nsamples, options.seqlen, options.config.seed)
    require_fits(original.model, tokens, options.seqlen)
    if evaluation_text is not None:
        evaluated = text.tokenize(evaluation_text, original.tokenizer)
        text.evaluation_windows(evaluated, options.evaluation_seqlen, options.evaluation_windows)
        require_fits(original.model, evaluated, options.evaluation_seqlen)
    coded = round_embeddings(original.model) if options.embedding == INT8 else {}
    hidden, calls = capture_inputs(original.model, decoder, windows[:1], compute)
    plan = make_plan(
        original,
        decoder,
        hidden[0],
        len(windows),
        calls[0],
        backend,
        compute,
        options.config,
        true_sequential=options.true_sequential,
        evaluation_seqlen=options.evaluation_seqlen if evaluation_text is not None else 0,
        saved_bytes=sum(matrix.saved_bytes for matrix in coded.values()),
    )
    if options.method == PT2_LLM and options.out is not None:
        writing.require_space(options.out, plan.packed_bytes + plan.other_bytes)
    return _Ready(original, decoder, backend, compute, len(tokens), windows, hidden, calls, plan, coded)


def _with_all_windows(ready: _Ready) -> _Ready:
    """The same with the hidden states of every window, where they wait between the layers."""
    with tqdm(total=len(ready.windows), desc="windows", unit="window", disable=None, leave=False) as bar:
        hidden, calls = capture_inputs(
            ready.original.model, ready.decoder, ready.windows, ready.compute, bar.update
        )
    return replace(ready, hidden=ready.compute.place(hidden, reserved=ready.plan.device_bytes), calls=calls)


def _announcement(options: Options, ready: _Ready, calibration_text: text.Text) -> list[str]:
    backend = ready.backend
    wanted = options.nsamples * options.seqlen
    lines = [
        f"{ready.original.name}: {options.method} on the {backend.name} backend",
        f"  calibration: {options.nsamples} windows of {options.seqlen} tokens; {calibration_text.protocol}",
    ]
    if ready.tokens < wanted:
        lines.append(f"  warning: the text has {ready.tokens} tokens for {wanted} asked for; windows overlap")
    if ignored := ready.original.ignored:
        some = ", ".join(ignored[:3]) + (", ..." if len(ignored) > 3 else "")
        lines.append(f"  warning: {len(ignored)} tensors of the files are not used by the model: {some}")
    if ready.plan.memory_bytes > host_memory():
        lines.append(
            f"  warning: this machine has {host_memory() / 1e9:.1f} GB of memory for the "
            f"{ready.plan.memory_bytes / 1e9:.1f} GB expected; fewer or shorter windows take less"
        )
    return lines + (ready.plan.lines() if options.method == PT2_LLM else [])


def _ternarize(
    options: Options,
    out: Path,
    ready: _Ready,
    record: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Ternarize the model and write the checkpoint layer by layer."""
    method = ternarizer(ready.backend, ready.compute, options.config)
    with writing.CheckpointWriter(out, len(ready.decoder.layers) + 1, ready.backend) as writer:

        def write(index: int, matrices: list[FittedMatrix]) -> None:
            results = {matrix.name: matrix.result for matrix in matrices}
            writer.add(_unpacked_tensors(ready.decoder, index), results)

        _run_layers(options, ready, method, write, record, say)
        writer.add(_outside_layers(ready))
        modules = list(ready.decoder.named_linears())
        writer.finish(ready.original, options.config, modules, list(ready.coded), record)


def _texts(options: Options) -> tuple[text.Text, text.Text | None]:
    """Text for calibration and evaluation; the defaults hang together."""
    calibration = options.calibration or (text.BUILTIN if options.model is None else "wikitext2")
    evaluation = options.evaluation
    if evaluation is None:
        named = calibration in (*text.DATA_SETS, text.BUILTIN)
        evaluation = calibration if named else NO_EVALUATION
    return (
        text.read_text(calibration, text.CALIBRATION, options.text_column),
        None
        if evaluation == NO_EVALUATION
        else text.read_text(evaluation, text.EVALUATION, options.text_column),
    )


def _run_layers(
    options: Options,
    ready: _Ready,
    method: Method,
    write: Callable[[int, list[FittedMatrix]], None],
    record: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Quantize every layer with a progress bar, write it, and say and record its figures."""
    begin = time.perf_counter()
    layers: list[dict[str, Any]] = []
    count = len(ready.decoder.layers)
    with (
        tqdm(total=count, disable=None, leave=False, bar_format=_BAR) as bar,
        ready.compute.explaining_lack_of_memory(),
    ):

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
            true_sequential=options.true_sequential,
            progress=progress,
        ):
            write(len(layers), layer.matrices)
            layers.append(report.layer_record(len(layers), layer))
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
    record["layers"] = layers
    record["mean_relative_output_error"] = report.mean_layer_error(layers)
    record["seconds"]["layers"] = time.perf_counter() - begin


_BAR = "{percentage:3.0f}% |{bar}| {n:.1f}/{total} layers [{elapsed}<{remaining}, {postfix}]"


def _unpacked_tensors(decoder: DecoderLayers, index: int) -> dict[str, torch.Tensor]:
    """What a decoder layer stores as it was: biases and norms."""
    packed = {f"{name}.weight" for name in decoder.linears[index]}
    names = [name for name in decoder.layers[index].state_dict() if name not in packed]
    return {decoder.full_name(index, name): tensor for name, tensor in decoder.tensors(index, names).items()}


def _outside_layers(ready: _Ready) -> dict[str, torch.Tensor]:
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


def _record(options: Options, ready: _Ready, calibration_text: text.Text) -> dict[str, Any]:
    """What is known of a run before its first layer."""
    layers_in = ready.compute.dtype or ready.original.model.dtype
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": ready.original.name,
        "dtype": dtype_name(ready.original.model.dtype),
        "method": options.method,
        "backend": ready.backend.name,
        "config": asdict(options.config),
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
        },
        **report.environment(),
        "device": ready.compute.describe(),
        "plan": {**asdict(ready.plan), "bits_per_weight": ready.plan.bits_per_weight},
        "perplexity": {},
        "seconds": {},
    }


def _result_lines(options: Options, record: dict[str, Any]) -> list[str]:
    lines = ["", *report.table(record["layers"]), ""]
    lines.append(f"mean relative output error of the layers {record['mean_relative_output_error']:.4f}")
    if not record["perplexity"]:
        lines.append("perplexity not measured: name a text with --eval")
    for when, result in record["perplexity"].items():
        lines.append(f"perplexity {when:6} {result['value']:.4g}   {result['protocol']}")
    if options.method == PT2_LLM and options.out is not None:
        weights = [file for pattern in writing.WEIGHT_FILES for file in options.out.glob(pattern)]
        size = sum(file.stat().st_size for file in weights)
        lines.append(f"{options.out}: {size / 1e6:.1f} MB of weights")
    seconds = sum(record["seconds"].values())
    device = record["peak_device_bytes"]
    lines.append(
        f"{duration(seconds)}, peak memory {record['peak_memory_bytes'] / 1e9:.1f} GB"
        + (f", of the device {device / 1e9:.1f} GB" if device else "")
    )
    return lines
