"""Settings of a fit that the format of another program can hold: --for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from harness.errors import UserError
from harness.quantize.options import AS_IT_IS, GGUF, MLX, Options
from harness.runtimes.containers import FOLDABLE_MODELS, GGUF_TYPES, MLX_GROUPS, Container
from reference.types import TernaryConfig

TYPES: dict[str, Sequence[Container]] = {GGUF: GGUF_TYPES, MLX: MLX_GROUPS}


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
    found = _held(options, config, TYPES[target], sorted(columns))
    if found is None:
        raise UserError(_refusal(options, sorted(columns)))
    held, block_size = found
    line = (
        f"for {target}: {columns_are}, blocks of {block_size}, alpha and mu in float16; "
        f"{held.name} holds them in {held.bits:.4g} bits per weight"
    )
    return replace(options, config=replace(config, block_size=block_size)), [line]


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


def _held(
    options: Options, config: TernaryConfig, types: Sequence[Container], columns: Sequence[int]
) -> tuple[Container, int] | None:
    """Find the first type that holds all matrices, with the block size nearest to the recipe's."""
    for held in types:
        block_size = config.block_size
        if block_size % held.columns and "block_size" not in options.given:
            block_size = held.columns
        if all(held.misfit(count, block_size, config.symmetric) is None for count in columns):
            return held, block_size
    return None


def _refusal(options: Options, columns: Sequence[int]) -> str:
    """Say why no type holds the matrices, and with which block sizes one would."""
    types = TYPES[str(options.target)]
    rows = " and ".join(map(str, dict.fromkeys(columns)))
    sizes = [held.columns for held in types if not any(count % held.columns for count in columns)]
    if not sizes:
        least = min(held.columns for held in types)
        return f"{options.target} cannot hold rows of {rows} columns: it needs a multiple of {least}"
    return (
        f"{options.target} cannot hold blocks of {options.config.block_size} in rows of {rows} columns; "
        f"pass a --block-size that is a multiple of {min(sizes)}, or none"
    )
