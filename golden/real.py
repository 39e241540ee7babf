"""Slices of a real model: the measured tensors, and cases on them, answered by `Dense`.

Each slice has one file. ``W`` (some rows and columns of one matrix), ``C`` (the Gram matrix of these columns'
activations) and sometimes ``X`` (the first activations) are measured; everything else in the file is computed
from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from golden import model
from golden.answers import answer
from golden.arithmetic import Array, Dense
from golden.cases import Case, Tensors
from golden.drafts import Drafts
from golden.exact import BEST
from golden.whole import damped

TOKENS_FILE = "real-tokens.safetensors"
KEPT_TOKENS = 96
MEASURED = ("W", "C", "X")


@dataclass(frozen=True)
class Slice:
    """Some rows and columns of one matrix, and its cases beyond the per-row operations."""

    layer: int
    matrix: str
    rows: slice
    columns: slice
    configs: dict[str, dict[str, Any]]
    extra: tuple[str, ...] = field(default=())

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"real-{self.layer:02}-{self.matrix}.safetensors"


# 127 to 256 columns, so that the last block of 128 has different widths.
SLICES = (
    Slice(0, "q", slice(0, 24), slice(0, 151), {"default": {}, "none": {"reorder": "none"}}),
    Slice(
        3,
        "k",
        slice(40, 64),
        slice(100, 229),
        {
            "default": {},
            "twn": {"start": "twn"},
            "no-compensation": {"compensation": False, "block_size": 50},
        },
        ("gram", "cosine", "invert", "matmul"),
    ),
    Slice(
        10,
        "v",
        slice(8, 24),
        slice(64, 192),
        {
            "default": {},
            "hessian-32": {"block_size": 32, "reorder": "hessian"},
            "best-40": {**BEST, "block_size": 40},
            "best-symmetric-40": {**BEST, "block_size": 40, "shift": "none"},
            "joint-grid-50": {"block_size": 50, "refinement": "grid"},
        },
        ("compensate",),
    ),
    Slice(
        15,
        "o",
        slice(300, 324),
        slice(200, 330),
        {"default": {}, "no-itf": {"itf": False}, "hessian": {"reorder": "hessian"}},
    ),
    Slice(
        20,
        "gate",
        slice(500, 520),
        slice(0, 200),
        {
            "blocks-of-64": {"block_size": 64},
            "conditional-64": {"block_size": 64, "aga": "conditional"},
            "best": BEST,
            "feed-forward-64": {"block_size": 64, "feed_forward": True},
        },
    ),
    Slice(
        26,
        "up",
        slice(700, 720),
        slice(449, 576),
        {"none-50": {"block_size": 50, "reorder": "none"}, "no-aga": {"aga": "none"}},
        ("damp", "invert"),
    ),
    Slice(
        29,
        "down",
        slice(100, 124),
        slice(1000, 1256),
        {"default": {}, "conditional": {"aga": "conditional"}, "hessian": {"reorder": "hessian"}},
    ),
)


def measure(loaded: Any, input_ids: Array) -> dict[str, Tensors]:
    """Measure the weights and Gram matrices of every slice, by file, on the model of `model.load`."""
    result: dict[str, Tensors] = {}
    for number, (weights, inputs) in enumerate(model.layers(loaded, input_ids)):
        for part in SLICES:
            if part.layer == number:
                X = inputs[part.matrix][:, part.columns]
                tensors = {"W": weights[part.matrix][part.rows, part.columns], "C": X.T @ X}
                if "gram" in part.extra:
                    tensors["X"] = X[:KEPT_TOKENS]
                result[part.file] = tensors
    return result


def cases(part: Slice, measured: Tensors) -> list[Case]:
    """Make the cases on one slice."""
    drafts = Drafts("real")
    W, C = measured["W"], measured["C"]
    here = f"layer-{part.layer:02}-{part.matrix}"
    add = drafts.add

    add("twn.symmetric_ternarize", here, {"W": W})
    first = add("atq.ternary_init", here, {"W": W})
    T = first["T"]
    add("atq.weight_error", here, {"W": W, **first})
    add("atq.weight_error_gradient", here, {"W": W, **first})
    grid = add("atq.build_optimal_grid", here, {"W": W, "T": T})
    add("atq.flexible_round", here, {"W": W, **grid})
    add("atq.iterative_ternary_fitting", f"{here}-limit", {"W": W}, max_iterations=2)
    fitted = add("atq.iterative_ternary_fitting", here, {"W": W})
    T = fitted["T"]
    fitted_grid = {"alpha": fitted["alpha"], "mu": fitted["mu"]}
    W_hat = fitted["alpha"] * T + fitted["mu"]
    add("aga.output_error", here, {"W": W, "W_hat": W_hat, "C": C})
    add("aga.output_error_gradient", here, {"W": W, **fitted_grid, "T": T, "C": C})
    add("aga.align_grid", here, {"W": W, "T": T, "C": C})
    add("aga.align_grid_printed", here, {"W": W, "T": T, "C": C})
    add("atq.build_optimal_grid", f"{here}-symmetric", {"W": W, "T": T}, symmetric=True)
    add("aga.align_grid", f"{here}-symmetric", {"W": W, "T": T, "C": C}, symmetric=True)
    add("ssr.select_block", here, {"W": W}, k=50)
    add("ssr.block_variance", here, {"W": W}, block_size=64)
    for codec in ("base3", "2bit"):
        packed = add(f"packing.pack_{codec}", here, {"trits": T})["packed"]
        add(f"packing.unpack_{codec}", here, {"packed": packed}, count=T.shape[1])

    H, _ = damped(Dense(), C, 0.01)
    if "cosine" in part.extra:
        add("ssr.cosine_similarity", here, {"W": W})
    if "damp" in part.extra:
        add("gptq.damp", here, {"C": C}, damping=0.01)
    if "invert" in part.extra:
        add("gptq.invert_damped", here, {"C": C}, damping=0.01)
    if "gram" in part.extra:
        add("gptq.gram", here, {"X": measured["X"]})
    if "compensate" in part.extra:
        _compensation(drafts, here, W, W - W_hat, H)
    for label, config in part.configs.items():
        ternary = add("ternarize.ternarize", f"{here}-{label}", {"W": W, "C": C}, **config)
        if label == "default" and "matmul" in part.extra:
            _product(drafts, here, measured["X"][:16], ternary)
    return drafts.cases


def _compensation(drafts: Drafts, here: str, W: Array, error: Array, H: Array) -> None:
    half = W.shape[1] // 2
    Hinv = np.linalg.inv(H)
    Hinv = (Hinv + Hinv.T) / 2
    blocks = {"Hinv_BB": Hinv[:half, :half], "Hinv_BR": Hinv[:half, half:]}
    inputs = {"W_R": W[:, half:], "E": error[:, :half], **blocks}
    drafts.add("gptq.compensate", here, inputs, hidden={"H": H})
    # Alternating columns, as SSR might choose them.
    ends = {"B": np.arange(0, W.shape[1], 2), "R": np.arange(1, W.shape[1], 2)}
    drafts.add("gptq.eliminate", here, {"Hinv": Hinv, **ends}, hidden={"H": H})


def _product(drafts: Drafts, here: str, x: Array, ternary: Tensors) -> None:
    packed = answer(Dense(), "packing.pack_base3", {"trits": ternary["trits"]}, {})["packed"]
    inputs = {"x": x, "packed": packed, **{n: ternary[n] for n in ("scale", "shift", "permutation")}}
    drafts.add("matmul.matmul", here, inputs, block_size=128)
