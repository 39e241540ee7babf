"""Options of a run: each is defined once, as a dataclass field with its help text.

`add_options` builds the command line from the fields, `from_arguments` reads the fields from a command line.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from harness import text
from harness.calibration.methods import BASELINES
from harness.cli import model_name, path, positive, window_length
from harness.errors import UserError
from harness.models.gguf import GGUF_DTYPES
from harness.models.loading import MODEL_HELP
from reference.types import ALIGNMENTS, GRIDS, REORDERINGS, STARTS, TernaryConfig

PT2_LLM = "pt2-llm"
NO_EVALUATION = "none"
AS_IT_IS, INT8 = "as-it-is", "int8"

CALIBRATION, METHOD, EVALUATION = "calibration", "method", "evaluation before and after quantization"
# Groups of the help, and their descriptions.
GROUPS = {
    CALIBRATION: None,
    METHOD: "defaults are the paper's, where it states them",
    EVALUATION: None,
}


def option(default: Any, group: str | None = None, flag: str | None = None, **argument: Any) -> Any:
    """Define a field as an option: its group in the help, its flag if not its name, argparse's keywords."""
    return field(default=default, metadata={"group": group, "flag": flag, "argument": argument})


SWITCH: dict[str, Any] = {"action": "store_true"}
ON_OR_OFF: dict[str, Any] = {"action": argparse.BooleanOptionalAction}


@dataclass(frozen=True)
class Options:
    """Options of a run.

    `measure_original` is not on the command line: after a first run on a model, further ones need not
    measure the original again.
    """

    model: str | None = option(
        None, flag="model", nargs="?", type=model_name, metavar="MODEL", help=MODEL_HELP
    )
    out: Path | None = option(None, type=path, metavar="DIR", help="output folder; optional for a baseline")
    force: bool = option(False, **SWITCH, help="write into DIR even if it is not empty")
    resume: bool = option(
        False, **SWITCH, help="continue an interrupted run into DIR; repeat its command and add this"
    )
    backend: str = option(
        "auto",
        choices=("auto", "reference", "gpu"),
        help="auto uses the GPU if there is a CUDA device with CuPy and numba-cuda, and prints its choice",
    )
    gguf_dtype: str = option("bfloat16", choices=GGUF_DTYPES, help="dtype to dequantize a GGUF file to")
    trust_remote_code: bool = option(False, **SWITCH, help="run code shipped with the model")

    calibration: str | None = option(
        None,
        CALIBRATION,
        metavar="TEXT",
        help=f"{text.SOURCES_HELP}. Default: wikitext2; for the embedded model {text.BUILTIN}",
    )
    text_column: str | None = option(
        None, CALIBRATION, metavar="NAME", help="field of .jsonl, .csv, .parquet and .arrow rows"
    )
    nsamples: int = option(128, CALIBRATION, type=positive, metavar="N", help="windows of calibration text")
    seqlen: int = option(2048, CALIBRATION, type=window_length, metavar="N", help="tokens per window")
    true_sequential: bool = option(
        False, CALIBRATION, **SWITCH, help="collect inputs again after each group of matrices in a layer"
    )

    method: str = option(
        PT2_LLM,
        METHOD,
        choices=(PT2_LLM, *BASELINES),
        help="pt2-llm, or a baseline in groups of --block-size, which writes a report but no checkpoint: "
        + "; ".join(f"{name}: {what}" for name, what in BASELINES.items()),
    )
    embedding: str = option(AS_IT_IS, METHOD, choices=(AS_IT_IS, INT8), help="storage of embedding and head")
    config: TernaryConfig = field(default_factory=TernaryConfig)

    evaluation: str | None = option(
        None,
        EVALUATION,
        "--eval",
        metavar="TEXT",
        help=f"text for perplexity, or {NO_EVALUATION}. Default: the evaluation split of --calibration, or "
        f"{NO_EVALUATION} if --calibration is a file",
    )
    evaluation_seqlen: int = option(
        2048, EVALUATION, "--eval-seqlen", type=window_length, metavar="N", help="tokens per window"
    )
    evaluation_windows: int | None = option(
        None,
        EVALUATION,
        "--eval-windows",
        type=positive,
        metavar="N",
        help="measure only the first N windows",
    )
    measure_original: bool = True


# Options of a fit, named after the fields of `TernaryConfig`, which holds their defaults.
CONFIG_OPTIONS: dict[str, dict[str, Any]] = {
    "block_size": {"type": positive, "metavar": "K", "help": "columns that share alpha and mu"},
    "grid": {
        "choices": GRIDS,
        "help": "storage type of alpha and mu; int8 saves an eighth of a bit per weight",
    },
    "start": {"choices": STARTS, "help": "initial grid: Eq. 4-5, or Eq. 1-3 with mu = 0"},
    "reorder": {"choices": REORDERINGS, "help": "order of the columns"},
    "itf": {**ON_OR_OFF, "help": "iterative ternary fitting"},
    "aga": {
        "choices": ALIGNMENTS,
        "help": "grid alignment: none, Eq. 12, Eq. 13 as printed, or Eq. 12 with the compensated cost",
    },
    "compensation": {**ON_OR_OFF, "help": "compensate the error of each block in the columns after it"},
    "damping": {"type": float, "metavar": "X", "help": "fraction of mean(diag C) added to the diagonal"},
    "max_iterations": {"type": positive, "metavar": "N", "help": "maximum rounds of ITF"},
    "seed": {"type": int, "metavar": "N", "help": "seed for the window positions and --reorder random"},
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add every option to a command line, in its group and with its default."""
    groups: dict[str | None, Any] = {
        name: parser.add_argument_group(name, what) for name, what in GROUPS.items()
    }
    groups[None] = parser
    for spec in _specified():
        group, flag, argument = (spec.metadata[key] for key in ("group", "flag", "argument"))
        flag = flag or f"--{spec.name.replace('_', '-')}"
        named = {"dest": spec.name} if flag.startswith("--") else {}
        groups[group].add_argument(flag, default=spec.default, **named, **argument)
    defaults = TernaryConfig()
    for name, argument in CONFIG_OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        groups[METHOD].add_argument(flag, default=getattr(defaults, name), **argument)


def from_arguments(arguments: argparse.Namespace) -> Options:
    """Read the options from a parsed command line.

    Raises
    ------
    UserError
        If `TernaryConfig` refuses a setting.
    """
    try:
        config = TernaryConfig(**{name: getattr(arguments, name) for name in CONFIG_OPTIONS})
    except ValueError as error:
        raise UserError(str(error)) from None
    return Options(**{spec.name: getattr(arguments, spec.name) for spec in _specified()}, config=config)


def _specified() -> Iterator[Field[Any]]:
    """Iterate over the fields of `Options` that are on the command line."""
    return (spec for spec in fields(Options) if spec.metadata)
