"""Prepare a run: load model and texts, and detect errors before any long work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from harness import text
from harness.backends import Backend, load_backend
from harness.calibration.capture import capture_inputs
from harness.calibration.methods import target_shift
from harness.calibration.passage import Passage, own_windows
from harness.calibration.targets import Targets
from harness.compute import Compute
from harness.errors import UserError
from harness.models.decoder import find_decoder_layers
from harness.models.linearize import linearize
from harness.models.loading import load_original
from harness.models.original import Original, require_fits
from harness.progress import Progress, Say
from harness.quantize.estimate import Plan, make_plan
from harness.quantize.options import INT8, NO_EVALUATION, STREAM, WEIGHTS, Options
from harness.ternary.embedding import CodedMatrix, round_embeddings
from harness.windows import beginning, bos_of, calibration_windows, evaluation_windows, tokenize


@dataclass
class Ready:
    """Everything that a run needs before its first layer.

    Attributes
    ----------
    original : Original
        The model and its tokenizer.
    backend : Backend
        Backend that ternarizes matrices.
    passage : Passage
        Hidden states of the first window; after `take_all_windows`, of every window.
    tokens : int
        Tokens of the calibration text.
    beginning : str
        Which windows begin with a BOS token, in words.
    windows : (samples, seqlen) int64 tensor
        Calibration windows.
    plan : Plan
        The estimate of the run.
    coded : dict of str to CodedMatrix
        Embedding and head, if stored in 8 bits.
    """

    original: Original
    backend: Backend
    passage: Passage
    tokens: int
    beginning: str
    windows: torch.Tensor
    plan: Plan
    coded: dict[str, CodedMatrix]

    def targets(self, options: Options) -> Targets | None:
        """What matrices are fitted to; None for their own weights."""
        if options.targets == WEIGHTS:
            return None
        shift = target_shift(self.backend, self.passage.compute, options.config.damping, options.strength)
        return Targets(shift, options.targets == STREAM, options.token_weights)


def require_other_folder(options: Options, out: Path) -> None:
    """Refuse an output folder that holds the original model."""
    source = Path(options.model).resolve() if options.model is not None else None
    if source is not None and out.resolve() in (source, source.parent if source.is_file() else source):
        raise UserError(f"{out} holds the original model; choose another --out")


def choose_backend(options: Options, say: Say) -> Backend:
    """Load the requested backend; for `auto`, print the choice and its reason.

    Raises
    ------
    UserError
        If the backend cannot run here, or lacks an operation that the settings need.
    """
    backend = load_backend(options.backend)
    if backend.note:
        say(backend.note)
    if options.config.aga == "printed" and "aga.align_grid_printed" in backend.refused:
        raise UserError(f"backend {backend.name} does not have Eq. 13 as printed; use --backend reference")
    return backend


def read_texts(options: Options, say: Say) -> tuple[text.AnyText, text.AnyText | None]:
    """Read the texts for calibration and evaluation; by default, both come from the same data set."""
    calibration, evaluation = options.calibration_source, options.evaluation_source
    text.require_rows(options.text_column, calibration, evaluation)
    for name in dict.fromkeys((calibration, evaluation)):
        if name in text.DATA_SETS:
            say(f"reading {name} from the Hugging Face Hub, or from its cache")
    column = options.text_column
    calibration_text = text.read_text(calibration, text.CALIBRATION, column)
    if evaluation == NO_EVALUATION:
        return calibration_text, None
    return calibration_text, text.read_text(evaluation, text.EVALUATION, column)


def prepare(
    options: Options,
    backend: Backend,
    compute: Compute,
    calibration_text: text.AnyText,
    evaluation_text: text.AnyText | None,
    settle: Callable[[Original], Options],
) -> Ready:
    """Load the model, find its decoder layers, cut windows, and estimate the run."""
    original = load_original(options.model, options.gguf_dtype, options.trust_remote_code)
    original = replace(original, read=linearize(original.model, original.read))
    options = settle(original)
    decoder = find_decoder_layers(original.model, original.read, options.strict)
    tokens = tokenize(calibration_text, original.tokenizer)
    bos = bos_of(original.model, original.tokenizer)
    windows = calibration_windows(tokens, options.nsamples, options.seqlen, options.config.seed, bos)
    require_fits(original.model, tokens.all(), options.seqlen)
    if evaluation_text is not None:
        evaluated = tokenize(evaluation_text, original.tokenizer)
        evaluation_windows(evaluated, options.evaluation_seqlen, options.evaluation_windows)
        require_fits(original.model, evaluated.all(), options.evaluation_seqlen)
    coded = round_embeddings(original.model) if options.embedding == INT8 else {}
    passage = capture_inputs(original.model, decoder, windows[:2], compute.alone())
    plan = make_plan(
        options,
        original,
        backend,
        passage,
        evaluated=evaluation_text is not None,
        saved_bytes=sum(matrix.saved_bytes for matrix in coded.values()),
        ranks=compute.ranks,
    )
    words = beginning(tokens, original.tokenizer, bos)
    return Ready(original, backend, passage, len(tokens), words, windows, plan, coded)


def take_all_windows(ready: Ready, options: Options, compute: Compute, say: Say) -> None:
    """Record the inputs of the first layer for every window, and place them where they are kept.

    Of several processes, each takes its own windows.

    With targets, the hidden states of the original model are kept beside those of the quantized one.
    """
    windows, seqlen = ready.windows.shape
    count = len(own_windows(windows, seqlen, compute.ranks))
    with Progress("calibration windows through the embedding", count, "window", say) as step:
        decoder = ready.passage.decoder
        ready.passage = capture_inputs(ready.original.model, decoder, ready.windows, compute, step)
    if options.targets != WEIGHTS:
        ready.passage.keep_original()
    ready.passage.place(reserved=ready.plan.device_bytes)
