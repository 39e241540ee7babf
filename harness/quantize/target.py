"""What a checkpoint for another program needs: --for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from harness.errors import UserError
from harness.models.classes import is_classifier
from harness.models.decoder import DecoderLayers
from harness.models.experts import Experts
from harness.models.original import Original
from harness.quantize.options import AS_IT_IS, GGUF, MLX, VLLM, Options
from harness.runtimes.containers import FOLDABLE_MODELS, GGUF_TYPES, MLX_GROUPS, Container, smallest
from harness.runtimes.features import refusals_of, require
from harness.runtimes.mlx_architectures import settings_of
from reference.types import TernaryConfig

TYPES: dict[str, Sequence[Container]] = {GGUF: GGUF_TYPES, MLX: MLX_GROUPS}

# A type that holds the recipe's blocks may take as many bits more than one that needs larger blocks.
WORTH = 0.5
# What larger blocks cost: perplexity of SmolLM2-135M on WikiText-2, by --shift (benchmarks/recipe.json,
# ladder.json and symmetric.json).
PERPLEXITY = {"free": {64: 87.2, 128: 99.2, 256: 118}, "none": {64: 93.6, 128: 121, 256: 116}}


def require_supported(target: str | None, original: Original, decoder: DecoderLayers) -> list[str]:
    """Refuse a model that its export for a program would refuse, in the same words.

    Parameters
    ----------
    target : str or None
        The program.
    original : Original
        The model; its weights are not read.
    decoder : DecoderLayers
        Its decoder layers.

    Returns
    -------
    list of str
        Lines that say what will differ from the model.

    Raises
    ------
    UserError
        If the program would compute something else than the model, or its format has no place for a part.
    """
    model = original.model
    with refusals_of(f"--for {target}: {original.name}"):
        if target == VLLM:
            require(not is_classifier(model), f"the plugin serves no {type(model).__name__}")
            experts = [name for name, part in model.named_modules() if isinstance(part, Experts)]
            require(not experts, f"the plugin has no experts ({experts and experts[0]})")
    if target not in TYPES:
        return []
    ternary = {f"{name}.weight" for name in decoder.named_linears()}
    left_out = ternary | getattr(model, "all_tied_weights_keys", {}).keys()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    with refusals_of(f"--for {target}: {original.name}"):
        if target == MLX:
            settings_of(model, tensors)
            return []
        from harness.runtimes.gguf_header import describe  # needs gguf

        return describe(model, original.tokenizer, tensors).notes


def choose(options: Options, columns: Collection[int]) -> tuple[Options, list[str]]:
    """Choose block size, order and storage of the grid for the program that a checkpoint is meant for.

    What the command line gives is kept, or refused if the program cannot hold it.

    Parameters
    ----------
    options : Options
        Options of the run; with no target they are returned as they are.
    columns : collection of int
        Lengths of the rows of all matrices.

    Returns
    -------
    Options
        Options with the chosen settings.
    list of str
        Lines that say what was chosen.

    Raises
    ------
    UserError
        If no type of the format holds the matrices with the settings that were given.
    """
    target = options.target
    if target is None:
        return options, []
    order = {} if options.foldable else {"reorder": "none"}
    columns_are = (
        "all columns but down_proj's in their order" if options.foldable else "columns in their order"
    )
    if target not in TYPES:  # vllm, through this project's own code
        return replace(options, config=_with(options, **order)), [f"for {target}: {columns_are}"]
    if options.embedding != AS_IT_IS:
        raise UserError(f"--for {target} needs the embedding as it is; drop --embedding {options.embedding}")
    config = _with(options, grid="float16", **order)
    rows = sorted(set(columns))
    own = _first(TYPES[target], config, rows)
    small = None if "block_size" in options.given else _smallest(TYPES[target], config, rows)
    lines = []
    if small is not None and (own is None or own.bits - small.bits > WORTH):
        if own is not None:
            lines.append(_alternative(config, small.columns, own))
        config = replace(config, block_size=small.columns)
    elif own is None:
        raise UserError(_refusal(options, rows))
    what = f"for {target}: {columns_are}, blocks of {config.block_size}, alpha and mu in float16; "
    lines.insert(0, what + _held(TYPES[target], config, rows))
    return replace(options, config=config), lines


def require_foldable(options: Options, config: Any) -> None:
    """Refuse --foldable where there is no order, or none that can be folded away."""
    if not options.foldable:
        return
    if options.config.reorder == "none":
        raise UserError("--foldable limits what is reordered; pass --reorder ssr as well, or drop it")
    if config.model_type not in FOLDABLE_MODELS:
        raise UserError(
            f"--foldable knows {', '.join(FOLDABLE_MODELS)}, not {config.model_type}; drop it, or pass "
            "--reorder none"
        )


def _with(options: Options, **settings: Any) -> TernaryConfig:
    """Change settings of a fit, unless the command line gives others."""
    for name, value in settings.items():
        given = getattr(options.config, name)
        if name in options.given and given != value:
            raise UserError(f"--for {options.target} needs --{name} {value}; drop --{name} {given}")
    return replace(options.config, **settings)


def _first(types: Sequence[Container], config: TernaryConfig, rows: Sequence[int]) -> Container | None:
    """The first type that holds all matrices."""
    for held in types:
        if all(held.misfit(count, config.block_size, config.symmetric) is None for count in rows):
            return held
    return None


def _smallest(types: Sequence[Container], config: TernaryConfig, rows: Sequence[int]) -> Container | None:
    """The first type that holds all matrices with some block size."""
    fitting = (held for held in types if _first([held], replace(config, block_size=held.columns), rows))
    return next(fitting, None)


def _held(types: Sequence[Container], config: TernaryConfig, rows: Sequence[int]) -> str:
    """Say which types the export will choose."""
    by_type: dict[Container, list[int]] = {}
    for count in rows:
        held, _ = smallest(types, count, config.block_size, config.symmetric)
        assert held is not None  # as one type holds all
        by_type.setdefault(held, []).append(count)
    kinds = {f"{held.name} ({held.bits:.4g} bits per weight)": counts for held, counts in by_type.items()}
    if len(kinds) == 1:
        return f"stored in {next(iter(kinds))}"
    return ", ".join(f"rows of {_listed(counts)} columns stored in {kind}" for kind, counts in kinds.items())


def _alternative(config: TernaryConfig, larger: int, own: Container) -> str:
    """Say what larger blocks than the recipe's cost, and how to keep those."""
    size, known = config.block_size, PERPLEXITY[config.shift]
    return (
        f"blocks of {larger} gave SmolLM2-135M a perplexity of {known[larger]:.3g} on WikiText-2, blocks "
        f"of {size} one of {known[size]:.3g}; --block-size {size} keeps these, in {own.name} "
        f"({own.bits:.4g} bits per weight)"
    )


def _listed(counts: Sequence[int]) -> str:
    return " and ".join(map(str, counts))


def _refusal(options: Options, columns: Sequence[int]) -> str:
    """Say why no type holds the matrices, and with which block sizes one would."""
    types = TYPES[str(options.target)]
    rows = _listed(columns)
    sizes = [held.columns for held in types if not any(count % held.columns for count in columns)]
    if not sizes:
        least = min(held.columns for held in types)
        rows = _listed([count for count in columns if count % least])
        return f"{options.target} cannot hold rows of {rows} columns: it needs a multiple of {least}"
    return (
        f"{options.target} cannot hold blocks of {options.config.block_size} in rows of {rows} columns; "
        f"pass a --block-size that is a multiple of {min(sizes)}, or none"
    )
