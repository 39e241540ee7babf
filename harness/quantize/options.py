"""Options of a run: each is defined once, as a dataclass field with its help text.

`add_options` builds the command line from the fields, `from_arguments` reads the fields from a command line.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from harness import text
from harness.calibration.methods import BASELINES, RTN
from harness.cli import model_name, path, positive, share, window_length
from harness.errors import UserError
from harness.models.gguf import GGUF_DTYPES
from harness.models.loading import MODEL_HELP, NO_GGUF, is_gguf
from harness.runtimes.containers import FOLDABLE
from reference.types import ALIGNMENTS, BEST, GRIDS, REORDERINGS, SHIFTS, STARTS, TernaryConfig

PT2_LLM = "pt2-llm"
NO_EVALUATION = "none"
BACKENDS = ("auto", "cpu", "gpu", "reference")
AS_IT_IS, INT8 = "as-it-is", "int8"

# Programs that a checkpoint can be meant for.
GGUF, MLX, VLLM = "gguf", "mlx", "vllm"

CALIBRATION, METHOD, EVALUATION = "calibration", "method", "evaluation before and after quantization"
# Groups of the help, and their descriptions.
GROUPS = {
    CALIBRATION: None,
    METHOD: "every step of a recipe has its own switch; of these, a baseline uses targets and their "
    "switches, --sequential, --block-size, --seed and, but for rtn-2bit, --damping, by default as the recipe "
    "paper has them",
    EVALUATION: None,
}

# What matrices are fitted to: their own weights, the original outputs, or also the original residual stream.
WEIGHTS, OUTPUTS, STREAM = "weights", "outputs", "stream"


@dataclass(frozen=True)
class Recipe:
    """A named set of defaults, for those settings that recipes differ in."""

    words: str
    config: TernaryConfig
    targets: str
    token_weights: bool
    true_sequential: bool


RECIPES = {
    # 8-bit codes for blocks of 64 take as many bits as float16 for blocks of 128, and lose less.
    "best": Recipe(
        "the least error known at these bits",
        replace(BEST, block_size=64, grid="int8"),
        targets=STREAM,
        token_weights=True,
        true_sequential=True,
    ),
    "paper": Recipe("the paper's method, as printed", TernaryConfig(), WEIGHTS, False, False),
}


def option(default: Any, group: str | None = None, flag: str | None = None, **argument: Any) -> Any:
    """Define a field as an option: its group in the help, its flags if not its name, argparse's keywords."""
    return field(default=default, metadata={"group": group, "flag": flag, "argument": argument})


SWITCH: dict[str, Any] = {"action": "store_true"}
ON_OR_OFF: dict[str, Any] = {"action": argparse.BooleanOptionalAction}


@dataclass(frozen=True)
class Options:
    """Options of a run.

    Without a command line, the defaults are those of the recipe "paper". `measure_original` is not on the
    command line: after a first run on a model, further ones need not measure the original again.
    """

    model: str | None = option(
        None, flag="model", nargs="?", type=model_name, metavar="MODEL", help=MODEL_HELP
    )
    out: Path | None = option(None, type=path, metavar="DIR", help="output folder; optional for a baseline")
    force: bool = option(False, **SWITCH, help="write into DIR even if it is not empty")
    resume: bool = option(
        False, **SWITCH, help="continue an interrupted run into DIR; repeat its command and add this"
    )
    keep_states: Path | None = option(
        None,
        type=path,
        metavar="DIR",
        help="keep the hidden states of the last finished layer here, so that --resume need not run the "
        "finished layers again",
    )
    backend: str = option(
        "auto",
        choices=BACKENDS,
        help="auto uses the GPU if there is a CUDA device with CuPy and numba-cuda, else the CPU, and prints "
        "its choice; reference is slow, and what both are held to",
    )
    gguf_dtype: str = option("bfloat16", choices=GGUF_DTYPES, help="dtype to dequantize a GGUF file to")
    trust_remote_code: bool = option(False, **SWITCH, help="run code shipped with the model")
    strict: bool = option(
        False, **SWITCH, help="refuse a model with matrices that are not understood, instead of leaving them"
    )

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

    method: str = option(
        PT2_LLM,
        METHOD,
        choices=(PT2_LLM, *BASELINES),
        help="pt2-llm, or a baseline in groups of --block-size, which writes a report but no checkpoint: "
        + "; ".join(f"{name}: {what}" for name, what in BASELINES.items()),
    )
    recipe: str | None = option(
        None,
        METHOD,
        choices=RECIPES,
        help="defaults of the switches below. "
        + "; ".join(f"{name}: {recipe.words}" for name, recipe in RECIPES.items()),
    )
    targets: str = option(
        WEIGHTS,
        METHOD,
        choices=(WEIGHTS, OUTPUTS, STREAM),
        help="what matrices are fitted to. weights: themselves; outputs: what they output in the original; "
        "stream: as outputs, but a matrix that adds to the residual stream makes up for all that it lacks",
    )
    strength: float = option(
        1.0,
        METHOD,
        type=share,
        metavar="S",
        help="share of the step from a matrix's own weights to its target, 0 to 1",
    )
    token_weights: bool = option(
        False,
        METHOD,
        **ON_OR_OFF,
        help="with --targets stream, weigh tokens by the inverse square of their stream's size",
    )
    true_sequential: bool = option(
        False,
        METHOD,
        "--sequential --true-sequential",
        **ON_OR_OFF,
        help="collect inputs again after each group of matrices in a layer",
    )
    foldable: bool = option(
        False,
        METHOD,
        **SWITCH,
        help="reorder only the columns of down_proj, whose order an export moves into gate_proj and up_proj",
    )
    embedding: str = option(AS_IT_IS, METHOD, choices=(AS_IT_IS, INT8), help="storage of embedding and head")
    target: str | None = option(
        None,
        METHOD,
        "--for",
        choices=(GGUF, MLX, VLLM),
        help="choose block size, order and grid so that this program's format can hold the checkpoint, and "
        "print them; a setting that is given is kept, or refused, and so is a model that the program would "
        "compute otherwise",
    )
    config: TernaryConfig = field(default_factory=TernaryConfig)
    # The settings of `config` that the command line names.
    given: tuple[str, ...] = field(default=(), compare=False)
    # The command line that they come from, for the report.
    command: str | None = field(default=None, compare=False)

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

    @property
    def calibration_source(self) -> str:
        """Name of the text to calibrate on."""
        if self.calibration is not None:
            return self.calibration
        return text.BUILTIN if self.model is None else "wikitext2"

    @property
    def evaluation_source(self) -> str:
        """Name of the text to measure perplexity on, by default of the data set to calibrate on; or none."""
        if self.evaluation is not None:
            return self.evaluation
        named = self.calibration_source in (*text.DATA_SETS, text.BUILTIN)
        return self.calibration_source if named else NO_EVALUATION

    def reorders(self, name: str) -> bool:
        """Whether the columns of a matrix are reordered."""
        foldable = name.rpartition(".")[2] == FOLDABLE
        return self.config.reorder != "none" and (foldable or not self.foldable)


# Switches that together say what `TernaryConfig.refinement` is.
REFINEMENT_SWITCHES = {
    "joint_grid": "after the last block, fit alpha and mu of all blocks of a row together",
    "descent": "alternate the joint grid with coordinate descent on the trits of whole rows",
}

# Options of a fit, named after the fields of `TernaryConfig`, which holds their defaults.
CONFIG_OPTIONS: dict[str, dict[str, Any]] = {
    "block_size": {"type": positive, "metavar": "K", "help": "columns that share alpha and mu"},
    "grid": {
        "choices": GRIDS,
        "help": "storage type of alpha and mu; int8 saves an eighth of a bit per weight",
    },
    "shift": {
        "choices": SHIFTS,
        "help": "mu: free, or none: 0 and not stored, for runtimes that hold alpha * t alone",
    },
    "start": {"choices": STARTS, "help": "initial grid: Eq. 4-5, or Eq. 1-3 with mu = 0"},
    "reorder": {"choices": REORDERINGS, "help": "order of the columns"},
    "itf": {**ON_OR_OFF, "help": "iterative ternary fitting"},
    "aga": {
        "choices": ALIGNMENTS,
        "help": "grid alignment: none, Eq. 12, Eq. 13 as printed, or Eq. 12 with the compensated cost",
    },
    "compensation": {**ON_OR_OFF, "help": "compensate the error of each block in the columns after it"},
    "feed_forward": {**ON_OR_OFF, "help": "round inside a block column by column, passing on each error"},
    "rounds": {"type": positive, "metavar": "N", "help": "at most N times joint grid, then descent"},
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

    def add(name: str, group: str | None, argument: dict[str, Any]) -> None:
        flags = _flags(name)
        named = {"dest": name} if flags[0].startswith("--") else {}
        found = {recipe: _default(recipe, name) for recipe in RECIPES}
        values = set(found.values())
        if values != {None} and (values != {False} or name in _RECIPE_FIELDS):
            if len(values) == 1:
                shown = _shown(values.pop())
            else:
                shown = ", ".join(f"{_shown(value)} ({recipe})" for recipe, value in found.items())
            argument = {**argument, "help": f"{argument['help']} (default: {shown})"}
        # None tells what was not given, for which from_arguments has the default.
        groups[group].add_argument(*flags, default=None, **named, **argument)

    for spec in _specified():
        add(spec.name, spec.metadata["group"], spec.metadata["argument"])
    for name, argument in CONFIG_OPTIONS.items():
        add(name, METHOD, argument)
    for name, words in REFINEMENT_SWITCHES.items():
        add(name, METHOD, {**ON_OR_OFF, "help": words})


def from_arguments(arguments: argparse.Namespace) -> Options:
    """Read the options from a parsed command line; what it does not say is the recipe's.

    Raises
    ------
    UserError
        If `TernaryConfig` refuses a setting, or a switch would change nothing.
    """
    recipe = arguments.recipe or ("best" if arguments.method in (None, PT2_LLM) else "paper")

    def value(name: str) -> Any:
        given = getattr(arguments, name)
        return _default(recipe, name) if given is None else given

    if arguments.descent and arguments.joint_grid is False:
        raise UserError("--descent alternates with the joint grid; drop --no-joint-grid")
    refinement = "none"
    if value("joint_grid") or arguments.descent:
        refinement = "descent" if value("descent") else "grid"
    try:
        config = TernaryConfig(**{name: value(name) for name in CONFIG_OPTIONS}, refinement=refinement)
    except ValueError as error:
        raise UserError(str(error)) from None
    named = {spec.name: value(spec.name) for spec in _specified()}
    given = tuple(name for name in CONFIG_OPTIONS if getattr(arguments, name) is not None)
    options = Options(**{**named, "recipe": recipe}, config=config, given=given)
    for name, cause in _without_effect(arguments, options):
        found = options.evaluation_source if cause == "evaluation" else value(cause)
        reason = f"{_flag(name, getattr(arguments, name))} has no effect with {_flag(cause, found)}"
        if getattr(arguments, cause) is not None:
            raise UserError(f"{reason}; drop one of them")
        whose = f"which recipe {recipe} has" if cause in _RECIPE_FIELDS else "the default with this text"
        raise UserError(f"{reason}, {whose}; drop it, or give {_flag(cause)} as well")
    if arguments.gguf_dtype is not None and not is_gguf(options.model):
        raise UserError(f"{_flag('gguf_dtype')} has no effect {NO_GGUF}; drop it")
    return options


def _without_effect(arguments: argparse.Namespace, options: Options) -> Iterator[tuple[str, str]]:
    """Settings of a command line that would change nothing, each with the setting that is why."""
    config = options.config
    idle: list[tuple[str, bool, str]] = []
    if options.method != PT2_LLM:
        used = {"block_size", "seed"} | (set() if options.method == RTN else {"damping"})
        names = ("foldable", "keep_states", *CONFIG_OPTIONS, *REFINEMENT_SWITCHES)
        idle += [(name, name not in used, "method") for name in names]
    unmeasured = options.evaluation_source == NO_EVALUATION
    idle += [
        ("strength", options.targets == WEIGHTS, "targets"),
        ("token_weights", arguments.token_weights and options.targets != STREAM, "targets"),
        (
            "rounds",
            config.refinement != "descent",
            "joint_grid" if arguments.joint_grid is False else "descent",
        ),
        ("max_iterations", not config.itf, "itf"),
        ("start", config.symmetric, "shift"),
        ("evaluation_windows", unmeasured, "evaluation"),
        ("evaluation_seqlen", unmeasured, "evaluation"),
    ]
    for name, changes_nothing, cause in idle:
        if changes_nothing and getattr(arguments, name) is not None:
            yield name, cause


def _flags(name: str) -> list[str]:
    """The flags of a setting on the command line."""
    flags = {"reorder": "--order --reorder"} | {spec.name: spec.metadata["flag"] for spec in _specified()}
    return (flags.get(name) or f"--{name.replace('_', '-')}").split()


def _flag(name: str, value: Any = None) -> str:
    """A setting as one types it, with its value if that is a word."""
    flag = _flags(name)[0]
    if value is False:
        return flag.replace("--", "--no-", 1)
    return f"{flag} {value}" if isinstance(value, str) else flag


_RECIPE_FIELDS = ("targets", "token_weights", "true_sequential", *CONFIG_OPTIONS, *REFINEMENT_SWITCHES)


def _default(recipe: str, name: str) -> Any:
    """The default of a setting in a recipe; of most, it is the same in all."""
    settings = RECIPES[recipe]
    if name in REFINEMENT_SWITCHES:
        return settings.config.refinement in (("grid", "descent") if name == "joint_grid" else ("descent",))
    if name in CONFIG_OPTIONS:
        return getattr(settings.config, name)
    return getattr(settings if name in _RECIPE_FIELDS else Options, name)


def _shown(value: Any) -> str:
    """A default as the help shows it."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _specified() -> Iterator[Field[Any]]:
    """Iterate over the fields of `Options` that are on the command line."""
    return (spec for spec in fields(Options) if spec.metadata)
