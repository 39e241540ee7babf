"""Run a whole quantization: from model and text to a checkpoint and its report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from harness.calibration.layerwise import fit_layers
from harness.calibration.methods import FitError
from harness.calibration.passage import Passage
from harness.compute import Compute, compute_for
from harness.distributed.launch import current
from harness.divergence import Reference
from harness.errors import UserError
from harness.files import write_json
from harness.machine import duration, host_memory, peak_memory
from harness.models.classes import is_classifier
from harness.models.folder import PAGE, REPORT
from harness.models.original import Original
from harness.page.page import write_page
from harness.page.tally import LOST_SHARE
from harness.perplexity import cut_windows, measure_on
from harness.progress import Progress, Say, say_on_stdout
from harness.quantize.options import Options
from harness.quantize.prepare import Ready, choose_backend, prepare, read_texts, take_all_windows
from harness.quantize.record import Record
from harness.quantize.report import mean_layer_error, table
from harness.quantize.resume import continue_from, require_same
from harness.quantize.sink import Sink, sink_for
from harness.quantize.states import KeptStates
from harness.ternary.embedding import unrounded
from harness.text import AnyText
from harness.words import counted
from reference.types import TernaryConfig

# Windows that the divergence from the original is measured on: the first of those for perplexity. It tells
# models apart on fewer tokens.
DIVERGENCE_WINDOWS = 4

_BAR = "{percentage:3.0f}% |{bar}| {n:.1f}/{total} layers [{elapsed}<{remaining}, {postfix}]"


def quantize(
    options: Options,
    say: Say = say_on_stdout,
    say_result: Say | None = None,
    examine: Callable[[Original], None] = lambda model: None,
) -> dict[str, Any]:
    """Quantize a model, write the checkpoint, and measure perplexity before and after.

    Parameters
    ----------
    options : Options
        Options of the run.
    say : callable
        Prints a line for the user.
    say_result : callable, optional
        Prints a line of the results at the end; `say` by default.
    examine : callable
        Receives the quantized model, before it is freed.

    Returns
    -------
    dict
        The contents of report.json.

    Raises
    ------
    UserError
        If the input cannot be used; as early as the error can be detected.
    """
    ranks = current()
    sink = sink_for(options, ranks)
    earlier = ranks.share(sink.require_folder(say))
    backend = choose_backend(options, say)
    calibration_text, evaluation_text = read_texts(options, say)
    compute = compute_for(backend)

    say(f"loading {options.model or 'the embedded model'}")
    began = time.perf_counter()
    ready = prepare(options, backend, compute, calibration_text, evaluation_text, sink.settle)
    options = sink.options
    sink.require_space(ready.plan)
    for line in announcement(options, sink, ready, calibration_text):
        say(line)
    take_all_windows(ready, options, compute, say)
    classifier = is_classifier(ready.original.model)
    if classifier:
        evaluation_text = None
    record = Record.of(options, ready, calibration_text, evaluation_text, sink.computed(ready, say))
    require_same(record, ranks)
    if earlier is not None and options.out is not None:
        continue_from(earlier, record, options.out)
    record.spent("load", began)
    kept = None
    if options.keep_states is not None and options.out is not None:
        kept = KeptStates(options.keep_states, options.out, ready.passage, *ready.windows.shape)
        say(f"  hidden states of finished layers: up to {kept.require_space() / 1e9:.2f} GB in {kept.folder}")

    # Of a model that is read from disk, only the first process has the quantized layers.
    where = compute if ready.original.read is None else compute.alone()

    def measure(when: str, model: Original) -> None:
        if evaluation_text is not None:
            seqlen, windows = options.evaluation_seqlen, options.evaluation_windows
            with record.time(f"perplexity {when}"):
                what = f"perplexity {when} quantization"
                record.measured(when, measure_on(model, evaluation_text, seqlen, windows, where, what, say))

    reference = None
    if where is compute or ranks.first:
        if options.measure_original and "before" not in record.perplexity:
            with unrounded(ready.coded):
                measure("before", ready.original)
        reference = keep_reference(options, ready, evaluation_text, record, where, say)
    with sink.open(ready, record, say):
        quantize_layers(options, sink, ready, record, say, kept)
        sink.finish(record)
    del ready  # the original and the quantized model need not fit in memory together
    quantized = sink.quantized(say)
    if where is compute or ranks.first:
        measure("after", quantized)
        if reference is not None:
            with record.time("divergence"):
                record.divergence = asdict(reference.divergence_of(quantized, where, say))
    examine(quantized)
    del quantized
    peaks = ranks.gather([peak_memory(), compute.peak_memory()])
    record.peak_memory_bytes, record.peak_device_bytes = map(max, zip(*peaks, strict=True))
    record.checkpoint_bytes = sink.weight_bytes()
    try:
        if options.out is not None and ranks.first:
            write_report(options.out, sink, record)
            write_page_beside(options.out, record, say)
    finally:
        for line in result_lines(sink, record, classifier):
            (say_result or say)(line)
    return record.to_json()


def keep_reference(
    options: Options,
    ready: Ready,
    evaluation_text: AnyText | None,
    record: Record,
    compute: Compute,
    say: Say,
) -> Reference | None:
    """Keep what the divergence from the original is measured by; None if the run cannot or need not.

    Codes of embedding and head change the head, which the original's logits need.
    """
    if evaluation_text is None or not options.measure_original or ready.coded:
        return None
    count = min(DIVERGENCE_WINDOWS, options.evaluation_windows or DIVERGENCE_WINDOWS)
    windows, *_ = cut_windows(ready.original, evaluation_text, options.evaluation_seqlen, count)
    with record.time("divergence"):
        return Reference.of(ready.original, windows, compute, say)


def announcement(options: Options, sink: Sink, ready: Ready, calibration_text: AnyText) -> list[str]:
    """Return the lines printed before a run: method, data, estimate and warnings."""
    wanted = options.nsamples * options.seqlen
    lines = [
        f"{ready.original.name}: {_named(options)} on the {sink.fitted_by(ready.backend)} backend",
        f"  calibration: {counted(options.nsamples, 'window')} of {options.seqlen} tokens; "
        f"{calibration_text.protocol}; {ready.beginning}",
    ]
    if ready.tokens < wanted:
        lines.append(
            f"  warning: the text has {counted(ready.tokens, 'token')}, {wanted} are requested; "
            "windows overlap"
        )
    if ignored := ready.original.ignored:
        some = ", ".join(ignored[:3]) + (", ..." if len(ignored) > 3 else "")
        lines.append(
            f"  warning: the model does not use {counted(len(ignored), 'tensor')} of its files: {some}"
        )
    if ready.plan.memory_bytes > host_memory():
        lines.append(
            f"  warning: this machine has {host_memory() / 1e9:.1f} GB of memory, the run needs about "
            f"{ready.plan.memory_bytes / 1e9:.1f} GB; use fewer or shorter windows"
        )
    return lines + sink.plan_lines(ready)


def _named(options: Options) -> str:
    """The method, and for PT²-LLM its recipe."""
    return f"{options.method}, recipe {options.recipe}" if options.recipe else options.method


def quantize_layers(
    options: Options,
    sink: Sink,
    ready: Ready,
    record: Record,
    say: Say,
    kept: KeptStates | None = None,
) -> None:
    """Quantize every unfinished layer; pass it to the sink, record it, and print its figures."""
    passage, count = ready.passage, len(ready.passage.calls)
    if record.done:
        with record.time("layers"):
            go_on(sink, ready, record, kept, say)
    with tqdm(total=count, initial=record.done, disable=None, leave=False, bar_format=_BAR) as bar:

        def progress(steps: int, stage: str) -> None:
            bar.set_postfix_str(stage, refresh=False)
            # A layer takes two passes of every window; extra passes of true-sequential are not counted.
            bar.update(min(steps / (2 * len(passage.hidden)), max(record.done + 1 - bar.n, 0)))

        layers = fit_layers(
            passage,
            sink.method(ready),
            first=record.done,
            true_sequential=options.true_sequential,
            targets=ready.targets(options),
            own=sink.own_methods(ready),
            adopt=ready.backend.to_device,
            progress=progress,
        )
        while record.done < count:
            with record.time("layers"):
                try:
                    layer = next(layers)
                except FitError:  # a resumed run would fail again
                    if kept is not None:
                        kept.forget()
                    raise
                sink.add(layer, record.done)
                checksums = {"outputs_checksum": passage.checksum()}
                if kept is not None and passage.originals:
                    checksums["originals_checksum"] = passage.checksum_of_originals()
                record.add(layer, checksums)
                del layer  # free its float64 matrices before those of the next are allocated
                if kept is not None:
                    kept.save(record.done)
            sink.note(record)
            if kept is not None:
                passage.compute.ranks.total([0])  # until the layer is noted, that before it must stay
                kept.forget(but=record.done)
            bar.update(record.done - bar.n)
            for line in layer_lines(record.layers[-1], count, options.config):
                say(line)
    if kept is not None:
        kept.forget()
    record.mean_relative_output_error = mean_layer_error(record.layers)


def go_on(sink: Sink, ready: Ready, record: Record, kept: KeptStates | None, say: Say) -> None:
    """Bring hidden states and model to where an interrupted run was."""
    passage, count = ready.passage, len(ready.passage.calls)
    if 0 < record.done < count:
        row = record.layers[-1]
        names = {
            "hidden": "outputs_checksum",
            **({"originals": "originals_checksum"} if passage.originals else {}),
        }
        if kept is None:
            return run_again(sink, ready, record, say)
        if not kept.load(record.done, {name: row.get(entry, 0) for name, entry in names.items()}):
            say(
                f"{kept.folder} does not hold the hidden states of layer {record.done} for every process: "
                "running the finished layers again"
            )
            return run_again(sink, ready, record, say)
    if passage.compute.ranks.size > 1:  # only the first process can read the result back
        for index in range(record.done):
            for name, dense in stored_everywhere(sink, passage, index).items():
                passage.decoder.replace(index, name, dense)


def run_again(sink: Sink, ready: Ready, record: Record, say: Say) -> None:
    """Run the finished layers of an interrupted run on the hidden states again.

    Raises
    ------
    UserError
        If the outputs of a layer differ from those of the interrupted run.
    """
    weights = (stored_everywhere(sink, ready.passage, index) for index in range(record.done))
    with Progress("finished layers", record.done, "layer", say) as step:
        for row, _ in zip(record.layers, ready.passage.again(weights), strict=True):
            if ready.passage.checksum() != row["outputs_checksum"]:
                raise UserError(
                    f"the outputs of layer {row['layer'] + 1} differ from those of the interrupted run: its "
                    "shard is damaged, or the machine differs (in its number of threads, say); resume on the "
                    "original machine, or start over with --force"
                )
            step()


def stored_everywhere(sink: Sink, passage: Passage, index: int) -> dict[str, torch.Tensor]:
    """Dense weights of a finished layer, which the first process reads and sends to the others."""
    compute, linears = passage.compute, passage.decoder.linears[index]
    weights = sink.stored(index) if compute.ranks.first else {}
    for name, linear in linears.items():
        empty = torch.empty(linear.weight.shape, dtype=linear.weight.dtype, device=compute.device)
        weights[name] = compute.ranks.share_tensor(weights.get(name, empty))
    return weights


def layer_lines(row: dict[str, Any], count: int, config: TernaryConfig) -> list[str]:
    """Format the figures of a finished layer, and warnings: more damping, alpha too small for its type."""
    lines = [
        f"layer {row['layer'] + 1:3d}/{count}  {counted(len(row['matrices']), 'matrix')}  "
        f"relative output error {row['relative_output_error']:.4f}  {sum(row['seconds'].values()):.1f} s"
    ]
    if sent := row.get("bytes_between_processes"):
        lines.append(f"  {sent / 1e6:.1f} MB between processes")
    if experts := row.get("experts"):
        lines.append(
            f"  experts: {counted(experts['matrices'], 'matrix')}, fewest tokens {experts['fewest_tokens']}; "
            f"{experts['filled_up']} with fewer tokens than columns are fitted to average tokens too, "
            f"{experts['without_tokens']} without tokens to those alone"
        )
    for matrix in row["matrices"]:
        if matrix.get("damping", 0.0) > config.damping:
            lines.append(f"  warning: {matrix['name']}: damping raised to {matrix['damping']:g}")
        if matrix.get("lost_blocks", 0.0) > LOST_SHARE:
            share = f"{matrix['lost_blocks']:.0%}"
            more = "; --grid int8 stores smaller ones" if config.grid == "float16" else ""
            lines.append(
                f"  warning: {matrix['name']}: alpha of {share} of its blocks is too small for "
                f"{config.grid}, and rounds to 0 or coarsely{more}"
            )
    return lines


def result_lines(sink: Sink, record: Record, classifier: bool = False) -> list[str]:
    """Return the lines printed after a run."""
    lines = ["", *table(record.layers), ""]
    lines.append(f"mean relative output error of layers {record.mean_relative_output_error:.4f}")
    if classifier:
        lines.append(
            "a classification head has no perplexity; harness.compare --original MODEL --data TEXT measures "
            "how far its labels are from the original's"
        )
    elif not record.perplexity:
        lines.append("perplexity not measured: name a text with --eval")
    for when, result in record.perplexity.items():
        lines.append(f"perplexity {when:6} {result['value']:.4g}   {result['protocol']}")
    if record.divergence is not None:
        lines.append(
            f"KL divergence from the original {record.divergence['mean']:.4g} nats, same most likely token "
            f"{record.divergence['agreement']:.1%}, over {counted(record.divergence['tokens'], 'prediction')}"
        )
    out = sink.options.out
    if record.checkpoint_bytes is not None:
        lines.append(f"{out}: {record.checkpoint_bytes / 1e6:.1f} MB of weights")
    if out is not None and (out / PAGE).is_file():
        lines.append(f"report: {out / PAGE}")
    host, device = (bytes_ or 0 for bytes_ in (record.peak_memory_bytes, record.peak_device_bytes))
    memory = f"{host / 1e9:.1f} GB" + (f", on the device {device / 1e9:.1f} GB" if device else "")
    return [*lines, f"{duration(sum(record.seconds.values()))}, peak memory {memory}"]


def write_report(out: Path, sink: Sink, record: Record) -> None:
    """Write report.json.

    Raises
    ------
    UserError
        If it cannot be written; the message says which results exist nevertheless.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / REPORT, record.to_json())
    except OSError as error:
        reason = f"{out / REPORT} could not be written: {error.strerror}"
        raise UserError(reason + sink.without_report) from None


def write_page_beside(out: Path, record: Record, say: Say) -> None:
    """Draw report.html beside report.json; a failure is printed only, as all results are saved."""
    try:
        write_page(record.to_json(), out / PAGE)
    except Exception as error:  # the results may have taken hours
        say(f"{out / PAGE} could not be drawn: {error}")
