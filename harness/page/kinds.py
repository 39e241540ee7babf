"""Group matrices of the same name in every layer, and of all experts of a layer."""

from __future__ import annotations


def kind_of(name: str) -> str:
    """Return the name of a matrix in its layer, with a star for the number of an expert.

    The first number in a full name counts the layers: ``model.layers.3.mlp.experts.17.down_proj`` is of the
    kind ``mlp.experts.*.down_proj``.
    """
    parts = name.split(".")
    layer = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join("*" if part.isdigit() else part for part in parts[layer + 1 :])


def short_names(kinds: list[str]) -> dict[str, str]:
    """Shorten kinds from the left to what still tells them apart."""
    short = {}
    for kind in kinds:
        parts = kind.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        unique = (end for end in endings if sum(f".{other}".endswith(f".{end}") for other in kinds) == 1)
        short[kind] = next(unique, kind)
    return short
