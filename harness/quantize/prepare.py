"""Before a run: load the model and the texts, and let everything fail that can fail early."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from harness import text
from harness.backends import Backend
from harness.calibration.capture import LayerCall, capture_inputs
from harness.compute import Compute
from harness.errors import UserError
from harness.machine import host_memory
from harness.models.decoder import DecoderLayers, find_decoder_layers
from harness.models.folder import require_space
from harness.models.loading import load_original
from harness.models.original import Original, require_fits
from harness.quantize.estimate import Plan, make_plan
from harness.quantize.options import INT8, NO_EVALUATION, PT2_LLM, Options
from harness.ternary.embedding import CodedMatrix, round_embeddings
from harness.ternary.format import is_ternary


@dataclass(frozen=True)
class Ready:
    """A model and its calibration inputs; `tokens` is the length of the whole calibration text.

    Hidden states are those of the first window until `with_all_windows`.
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


def require_other_folder(options: Options, out: Path) -> None:
    """Refuse to write over what is read, and to put a baseline's report over a checkpoint's."""
    source = Path(options.model).resolve() if options.model is not None else None
    if source is not None and out.resolve() in (source, source.parent if source.is_file() else source):
        raise UserError(f"{out} is where the original model lies; choose another --out")
    if options.method != PT2_LLM and is_ternary(out):
        raise UserError(f"{out} holds a checkpoint, and a baseline gives none; choose another --out")


def read_texts(options: Options) -> tuple[text.Text, text.Text | None]:
    """Text for calibration and evaluation; the defaults hang together."""
    calibration = options.calibration
    if calibration is None:
        calibration = text.BUILTIN if options.model is None else "wikitext2"
    evaluation = options.evaluation
    if evaluation is None:
        named = calibration in (*text.DATA_SETS, text.BUILTIN)
        evaluation = calibration if named else NO_EVALUATION
    text.require_rows(options.text_column, calibration, evaluation)
    return (
        text.read_text(calibration, text.CALIBRATION, options.text_column),
        None
        if evaluation == NO_EVALUATION
        else text.read_text(evaluation, text.EVALUATION, options.text_column),
    )


def prepare(
    options: Options,
    backend: Backend,
    compute: Compute,
    calibration_text: text.Text,
    evaluation_text: text.Text | None,
) -> Ready:
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
        require_space(options.out, plan.packed_bytes + plan.other_bytes)
    return Ready(original, decoder, backend, compute, len(tokens), windows, hidden, calls, plan, coded)


def with_all_windows(ready: Ready) -> Ready:
    """The same with the hidden states of every window, where they wait between the layers."""
    with tqdm(total=len(ready.windows), desc="windows", unit="window", disable=None, leave=False) as bar:
        hidden, calls = capture_inputs(
            ready.original.model, ready.decoder, ready.windows, ready.compute, bar.update
        )
    return replace(ready, hidden=ready.compute.place(hidden, reserved=ready.plan.device_bytes), calls=calls)


def fitting_backend(options: Options, ready: Ready) -> str:
    """The name of what fits the matrices: baselines are there in NumPy only, wherever layers run."""
    return ready.backend.name if options.method == PT2_LLM else "reference"


def announcement(options: Options, ready: Ready, calibration_text: text.Text) -> list[str]:
    """What is printed before a run: what will be done, what it will take, and what to be warned of."""
    wanted = options.nsamples * options.seqlen
    lines = [
        f"{ready.original.name}: {options.method} on the {fitting_backend(options, ready)} backend",
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
