"""Answers for the packed layout, from the description at the head of `reference/layout.py`.

Every trit, number and index is placed individually, with Python integers: words and positions are sums,
floats are their bits.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from golden.cases import Array, Tensors

# t = 0 in all 16 places of a word.
FILLED = sum(4**i for i in range(16))
LARGEST_FLOAT16 = 65504


def lay_words(trits: Array) -> Tensors:
    """Lay out trits (n, m) as ``words``."""
    n, m = trits.shape
    tiles, chunks = -(-n // 32), -(-m // 256)
    words = [FILLED] * (tiles * chunks * 32 * 16)
    for i, row in enumerate(trits.tolist()):
        for j, t in enumerate(row):
            place = 4 * (j // 16 % 4) + j % 256 // 64
            words[16 * _row_of_chunk(i, j, chunks) + place] += t * 4 ** (j % 16)
    return {"words": np.array(words, dtype=np.uint32).reshape(tiles, chunks, 32, 16)}


def lay_grid(grid: Array, columns: int, block_size: int) -> Tensors:
    """Lay out numbers (n, blocks, 2), float16 or int8, as ``grid``, column by column of the matrix."""
    bits = grid.view(f"uint{8 * grid.dtype.itemsize}")
    tiles, chunks, pairs = -(-len(grid) // 32), -(-columns // 256), max(1, 256 // block_size)
    placed = [[0, 0] for _ in range(tiles * chunks * 32 * pairs)]
    for i, row in enumerate(bits.tolist()):
        for j in range(columns):
            placed[pairs * _row_of_chunk(i, j, chunks) + j % 256 // block_size] = row[j // block_size]
    whole = np.array(placed, dtype=bits.dtype).reshape(tiles, chunks, 32, pairs, 2)
    return {"grid": whole.view(grid.dtype)}


def lay_out(packed: Array, permutation: Array, block_size: int, **grids: Array) -> Tensors:
    """Lay out a whole matrix; a coded grid is given as ``scale.codes``, ``scale.row`` and ``scale.block``."""
    n, m = len(packed), len(permutation)
    rows = [[byte // 3**i % 3 - 1 for byte in row for i in range(5)][:m] for row in packed.tolist()]
    width = -(-m // 256) * 256
    order = [permutation.tolist() + [0] * (width - m)]
    return {
        **lay_words(np.array(rows, dtype=np.int8)),
        **_grids(grids, n, m, block_size),
        "permutation": np.array(order, dtype=np.uint16 if m <= 65536 else np.uint32),
        "ends": np.array([n]),
        "columns": np.array(m),
        "block_size": np.array(block_size),
    }


def join(block_size: int, **parts: Array) -> Tensors:
    """Lay out several matrices; the arguments of the first are named ``layouts.0.packed`` and so on."""
    given: dict[str, Tensors] = {}
    for path, value in parts.items():
        _, index, name = path.split(".", 2)
        given.setdefault(index, {})[name] = value
    layouts: list[Tensors] = [lay_out(block_size=block_size, **part) for part in given.values()]
    joined = dict(layouts[0])
    for layout in layouts[1:]:
        for name in ("words", "grid", "permutation", "row_factors", "block_factors"):
            if name in joined:
                joined[name] = np.array([*joined[name], *layout[name]])
        joined["ends"] = np.array([*joined["ends"], joined["ends"][-1] + layout["ends"][0]])
        joined["in_float16"] = np.array(bool(joined["in_float16"]) and bool(layout["in_float16"]))
    return joined


def _row_of_chunk(i: int, j: int, chunks: int) -> int:
    """Number of chunk rows before the one that holds T[i, j]."""
    return (i // 32 * chunks + j // 256) * 32 + i % 32


def _grids(grids: Tensors, n: int, m: int, k: int) -> dict[str, Any]:
    """Lay out alpha and mu: grid and factors."""
    numbers, kinds = [], set()
    for name in ("scale", "shift"):
        if name in grids:
            numbers.append([[Fraction(value) for value in row] for row in grids[name].tolist()])
            kinds.add(grids[name].dtype.name)
        else:
            codes, row, block = (grids[f"{name}.{part}"].tolist() for part in ("codes", "row", "block"))
            numbers.append(
                [
                    [Fraction(r[0]) * Fraction(b) * code for b, code in zip(block[0], of_row, strict=True)]
                    for r, of_row in zip(row, codes, strict=True)
                ]
            )
            kinds.add("codes")
    largest = max(abs(a) + abs(b) for rows in zip(*numbers, strict=True) for a, b in zip(*rows, strict=True))
    found: dict[str, Any] = {"in_float16": np.array(largest <= LARGEST_FLOAT16)}
    chunked = k in [64 * 2**i for i in range(20)]
    if chunked and kinds == {"float16"}:
        found |= lay_grid(_pairs(grids["scale"], grids["shift"]), m, k)
    elif chunked and kinds == {"codes"}:
        found |= lay_grid(_pairs(grids["scale.codes"], grids["shift.codes"]), m, k)
        # Block factors are laid out like the pairs of one row, row factors like the rows.
        blocks = lay_grid(_pairs(grids["scale.block"], grids["shift.block"]), m, k)["grid"]
        found["block_factors"] = blocks[:1, :, 0]
        rows = grids["scale.row"][:, 0].tolist()
        found["row_factors"] = np.array(rows + [0.0] * (-n % 32), dtype=np.float16)
    else:
        wide = np.float32 if kinds <= {"float16", "float32", "codes"} else np.float64
        plain = np.zeros((-(-n // 32) * 32, -(-m // k), 2), dtype=wide)
        for which, of_blocks in enumerate(numbers):
            for i, row in enumerate(of_blocks):
                for b, value in enumerate(row):
                    plain[i, b, which] = float(value)
        found["grid"] = plain
    return found


def _pairs(scale: Array, shift: Array) -> Array:
    return np.array(
        [list(zip(*rows, strict=True)) for rows in zip(scale.tolist(), shift.tolist(), strict=True)],
        dtype=scale.dtype,
    )


ANSWERS: dict[str, Callable[..., Tensors]] = {
    "layout.lay_words": lay_words,
    "layout.lay_grid": lay_grid,
    "layout.lay_out": lay_out,
    "layout.join": join,
}
